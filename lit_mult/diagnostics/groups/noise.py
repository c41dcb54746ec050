"""Signal and noise of the gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lit_mult.config import RunConfig
from lit_mult.diagnostics.group import Group, Moment
from lit_mult.diagnostics.parts import trainable_parts
from lit_mult.diagnostics.readings import Reading
from lit_mult.errors import ConfigError


class Noise(Group):
    """Signal and noise of every parameter's gradient, from those of the two halves of a step's batch of B sequences.

    With the gradients g1, g2 of the halves and G = (g1 + g2) / 2 of the whole, the unbiased estimates of
    arXiv:1812.06162 appendix A.1 for B_big = B and B_small = B / 2, averaged over both halves, come to

        signal = (B_big |G|² - B_small |g|²) / (B_big - B_small)  = g1 · g2         squared 2-norm of the true gradient
        noise  = (|g|² - |G|²) / (1 / B_small - 1 / B_big)        = B |g1 - g2|² / 4     trace of its covariance over
                                                                                            sequences
    where the right-hand forms avoid cancellation. snr = signal / (noise / B), of this batch's gradient. A single
    estimate is noisy, and signal may be negative: average signal and noise over steps before dividing them.
    """

    def check(self, config: RunConfig, processes: int) -> None:
        if processes > 1:
            allowed = f"noise halves the batch of one process, and there are {processes}; leave it out or use one"
            raise ConfigError("train.diagnostics", "noise", allowed)

    def before_update(self, moment: Moment) -> Iterator[Reading]:
        parts = trainable_parts(moment.model)
        batch = sum(map(len, moment.windows_BT1))
        first, second = _half_gradients(moment, [part.parameter for part in parts])
        for part, g1, g2 in zip(parts, first, second, strict=True):
            a, b = g1.float().flatten(), g2.float().flatten()
            signal, noise = a @ b, batch * (a - b).square().sum() / 4
            yield part.reading("signal", signal)
            yield part.reading("noise", noise)
            yield part.reading("snr", signal * batch / noise)


def _half_gradients(moment: Moment, parameters: list[nn.Parameter]) -> list[list[Tensor]]:
    """Gradients of the two halves of the step's batch, with dropout, in micro-batches of the run's size."""
    windows_BT1 = torch.cat(list(moment.windows_BT1))
    batch, micro = len(windows_BT1), len(moment.windows_BT1[0])
    gpus = [windows_BT1.device] if windows_BT1.is_cuda else []
    halves: list[list[Tensor]] = []
    with torch.random.fork_rng(gpus), torch.enable_grad():
        for half_BT1 in windows_BT1.chunk(2):
            total: list[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
            for chunk_BT1 in half_BT1.split(micro):
                with moment.forward_context():
                    loss, _ = moment.module.training_loss(chunk_BT1)
                # Not backward(), which would add to .grad.
                gradients = torch.autograd.grad(loss * (2 * len(chunk_BT1) / batch), parameters)
                torch._foreach_add_(total, gradients)
            halves.append(total)
    return halves
