"""AdamW and Muon as one optimizer, so that Lightning's automatic optimization, schedulers and checkpoints apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Optimizer

from lit_mult.config import OptimConfig
from lit_mult.optim.muon import NS_COEFFICIENTS, Muon

# Devices on which torch ships a fused AdamW kernel.
_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}


class HybridOptimizer(Optimizer):
    """Runs `torch.optim.AdamW` and `optim.muon.Muon` over one list of parameter groups and one state.

    Muon's update is matched to Adam's RMS (arXiv:2502.16982), so that both take learning rates of the same size.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        """Each group names its `optimizer`, adamw or muon, and has its own `lr` and `weight_decay`.

        Raises:
            ValueError: a parameter stands in two groups, or a group names another optimizer.
        """
        by_name: dict[str, list[dict[str, Any]]] = {"adamw": [], "muon": []}
        for group in groups:
            if group["optimizer"] not in by_name:
                raise ValueError(f"group {group['name']}: unknown optimizer {group['optimizer']!r}")
            by_name[group["optimizer"]].append(group)
        self._parts: list[Optimizer] = []
        if by_name["adamw"]:
            devices = {parameter.device.type for group in by_name["adamw"] for parameter in group["params"]}
            fused = devices <= _FUSED_DEVICES
            self._parts.append(AdamW(by_name["adamw"], betas=config.betas, eps=config.eps, fused=fused))
        if by_name["muon"]:
            self._parts.append(
                Muon(
                    by_name["muon"],
                    momentum=config.muon_momentum,
                    ns_coefficients=NS_COEFFICIENTS,
                    ns_steps=config.muon_ns_steps,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._link()
        self._complete = True

    def _link(self) -> None:
        """Give every part its slice of the groups and the shared state; both are replaced when a state is loaded."""
        start = 0
        for part in self._parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the constructor: a later group would belong to neither optimizer and never be trained."""
        if getattr(self, "_complete", False):
            raise RuntimeError("groups are fixed at construction; build the optimizer anew")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._link()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        first, *others = self._parts
        loss: Tensor | None = first.step(closure)  # type: ignore[arg-type]  # which calls it before any update
        for part in others:
            part.step()
        return loss
