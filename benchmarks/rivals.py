"""The training loops that are compared: bare loops around four models, and the full Lightning path.

Shapes are those of a Llama of 4 layers, heads of 32, byte vocabulary; every loop has fused AdamW and clips at norm 1.
nanoGPT-mup has another block of about the same size (LayerNorm, GELU MLP of 4 d, learned positions, tied embeddings).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from interleaving import Contestant, Turns
from lightning import Callback
from torch import Tensor, nn

import lit_mult
from lit_mult.config import RunConfig
from lit_mult.method.plan import plan_run
from lit_mult.nn.init import initialize
from lit_mult.nn.llama import Llama
from lit_mult.optim.clipping import clip_gradients
from lit_mult.optim.groups import parameter_groups, plan_parameters
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.registry.roles import Role
from lit_mult.training.run import run

VOCABULARY, HEAD, MLP_RATIO, CLIP = 256, 32, 2.75, 1.0


@dataclass(frozen=True)
class Setting:
    """One model and batch, and how it is trained."""

    width: int
    layers: int = 4
    batch: int = 16
    time: int = 128
    precision: str = "fp32"
    """fp32, or bf16 for mixed precision."""
    device: str = "cpu"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of our own loops."""

    @property
    def hidden(self) -> int:
        return round(MLP_RATIO * self.width)

    def config(self, multipliers: str, **overrides: Any) -> RunConfig:
        """The run config of this setting; 10^9 steps, as turns end it."""
        return RunConfig().with_overrides(
            {
                "multipliers": multipliers,
                "model.d_model": self.width,
                "model.n_layers": self.layers,
                "model.head_dim": HEAD,
                "model.mlp_ratio": MLP_RATIO,
                "optim.clip": CLIP,
                "data.seq_len": self.time,
                "data.val_windows": 16,
                "train.batch_size": self.batch,
                "train.steps": 10**9,
                "train.checkpoint_every": None,
                "trainer.accelerator": self.device,
                "trainer.precision": {"fp32": "32-true", "bf16": "bf16-mixed"}[self.precision],
                "trainer.progress_bar": False,
                "trainer.tensorboard": False,
                **self.overrides,
                **overrides,
            }
        )


def hugging_face(setting: Setting, turns: Turns, multipliers: str | None = None, compiled: bool = False) -> None:
    """Transformers' `LlamaForCausalLM` with sdpa; with `multipliers`, those that `add_multipliers` gives it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=setting.width,
            intermediate_size=setting.hidden,
            num_hidden_layers=setting.layers,
            num_attention_heads=setting.width // HEAD,
            num_key_value_heads=setting.width // HEAD,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).to(setting.device)
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer = clip = None
    if multipliers is not None:
        lit_mult.add_multipliers(model, multipliers, verbose=False)
        groups = lit_mult.build_param_groups(model, lr=1e-3, weight_decay=0.1)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        clip = partial(lit_mult.clip_grad_norm_, model, CLIP)

    def loss_of(window: Tensor) -> Tensor:
        return _cross_entropy(forward(window[:, :-1]).logits, window)

    _loop(setting, turns, model, loss_of, optimizer, clip)


def litgpt(setting: Setting, turns: Turns) -> None:
    """LitGPT's `GPT` in the form of a Llama."""
    from litgpt import GPT, Config

    model = GPT(
        Config(
            block_size=setting.time,
            vocab_size=VOCABULARY,
            padded_vocab_size=VOCABULARY,
            n_layer=setting.layers,
            n_head=setting.width // HEAD,
            n_embd=setting.width,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=setting.hidden,
        )
    ).to(setting.device)
    _loop(setting, turns, model, lambda window: _cross_entropy(model(window[:, :-1]), window))


def nanogpt_mup(checkout: Path, setting: Setting, turns: Turns) -> None:
    """The model of a checkout of EleutherAI/nanoGPT-mup, with muP on."""
    spec = importlib.util.spec_from_file_location("nanogpt_mup", checkout / "model.py")
    assert spec is not None
    assert spec.loader is not None
    theirs = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        model = theirs.GPT(
            theirs.GPTConfig(
                block_size=setting.time,
                vocab_size=VOCABULARY,
                n_layer=setting.layers,
                n_head=setting.width // HEAD,
                n_embd=setting.width,
                bias=False,
                mup_enabled=True,
                mup_width_multiplier=setting.width / 32,
            )
        ).to(setting.device)
    # Its views of the targets need them in one piece.
    _loop(setting, turns, model, lambda window: model(window[:, :-1], window[:, 1:].contiguous())[1])


def own(setting: Setting, multipliers: str, turns: Turns) -> None:
    """Our model, optimizer and clipping without Lightning."""
    config = setting.config(multipliers)
    plan = plan_run(config, VOCABULARY)
    model = Llama(config.model, plan)
    initialize(model, plan, config.seed)
    model.to(setting.device)
    rows = plan_parameters(model, plan)
    optimizer = HybridOptimizer(parameter_groups(rows), config.optim)
    clipped = [row.parameter for row in rows if row.role is not Role.MULTIPLIER]
    clip = partial(clip_gradients, clipped, config.optim.clip)
    _loop(setting, turns, model, lambda window: _cross_entropy(model(window[:, :-1]), window), optimizer, clip)


def lightning(setting: Setting, multipliers: str, compiled: bool, turns: Turns) -> None:
    """The full path: data, Trainer, callbacks, clipping and schedule."""
    config = setting.config(multipliers, **{"trainer.compile": compiled})
    with TemporaryDirectory() as folder:
        run(config, folder, keep_checkpoint=False, callbacks=[_InTurns(turns)])


class _InTurns(Callback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_start(self, *_: Any) -> None:
        self.turns.step_starts()


def _loop(
    setting: Setting,
    turns: Turns,
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    clip: Callable[[], Any] | None = None,
) -> None:
    parameters = list(model.parameters())
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    clip = clip or partial(nn.utils.clip_grad_norm_, parameters, CLIP)
    windows = torch.randint(VOCABULARY, (64, setting.batch, setting.time + 1), device=setting.device)
    mixed = partial(torch.autocast, setting.device, torch.bfloat16, enabled=setting.precision == "bf16")
    for step in count():
        turns.step_starts()
        with mixed():
            loss = loss_of(windows[step % len(windows)])
        loss.backward()
        clip()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _cross_entropy(logits: Tensor, window: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


def available(setting: Setting, checkout: Path | None) -> tuple[dict[str, Contestant], Iterable[str]]:
    """The bare loops around other models that are there, and for each that is not a line on how to get it."""
    there: dict[str, Contestant] = {"hf": partial(hugging_face, setting)}
    missing = []
    if importlib.util.find_spec("litgpt"):
        there["litgpt"] = partial(litgpt, setting)
    else:
        missing.append("litgpt: left out; `pip install --no-deps --target FOLDER litgpt`, then PYTHONPATH=FOLDER")
    if checkout and (checkout / "model.py").is_file():
        there["nanogpt-mup"] = partial(nanogpt_mup, checkout, setting)
    else:
        missing.append("nanogpt-mup: left out; clone github.com/EleutherAI/nanoGPT-mup, then --nanogpt-mup PATH")
    return there, missing
