"""What the gradient of a step says: its size, and how much of it is signal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from lit_mult.diagnostics.keys import MetricKey
from lit_mult.diagnostics.parts import Part, Reading, rms, trainable_parts
from lit_mult.optim.clipping import gradient_norm


def gradient_sizes(model: nn.Module) -> Iterator[Reading]:
    """RMS of every parameter's gradient (weight_gradient_rms, row_gradient_rms, ...), and 2-norms of all together.

    gradient_norm_without_multipliers is what the paper clips (arXiv:2601.04890 sec. 4.3). To be read before clipping.
    """
    parts = [part for part in trainable_parts(model) if part.parameter.grad is not None]
    for part in parts:
        assert part.parameter.grad is not None
        yield part.key("gradients", "gradient_rms"), rms(part.parameter.grad)
    without = [part.parameter for part in parts if part.kind in ("weight", "norm")]
    for what, parameters in (("with", [part.parameter for part in parts]), ("without", without)):
        key = MetricKey("gradients", f"gradient_norm_{what}_multipliers", "model", None, "model")
        yield key, gradient_norm(parameters).float()


def gradient_noise(
    parts: Sequence[Part], first: Sequence[Tensor], second: Sequence[Tensor], batch: int
) -> Iterator[Reading]:
    """Signal and noise of every parameter's gradient, from those of the two halves of a batch of `batch` sequences.

    With the gradients g1, g2 of the halves and G = (g1 + g2) / 2 of the whole, the unbiased estimates of
    arXiv:1812.06162 appendix A.1 for B_big = B and B_small = B / 2, averaged over both halves, come to

        signal = (B_big |G|² - B_small |g|²) / (B_big - B_small)  = g1 · g2         squared 2-norm of the true gradient
        noise  = (|g|² - |G|²) / (1 / B_small - 1 / B_big)        = B |g1 - g2|² / 4     trace of its covariance over
                                                                                            sequences
    where the right-hand forms do not cancel. snr = signal / (noise / B): of the gradient of this batch. One estimate
    is noisy and a signal may be negative: average signal and noise over steps before they are divided.
    """
    for part, g1, g2 in zip(parts, first, second, strict=True):
        a, b = g1.float().flatten(), g2.float().flatten()
        signal, noise = a @ b, batch * (a - b).square().sum() / 4
        yield part.key("noise", "signal"), signal
        yield part.key("noise", "noise"), noise
        yield part.key("noise", "snr"), signal * batch / noise
