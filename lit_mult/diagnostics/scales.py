"""How large matrices, effective matrices, multipliers and norms are, and how far one step moves them.

‖x‖ is the root mean square of the entries, the norm of arXiv:2601.04890.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lit_mult.diagnostics.keys import MetricKey, layer_of
from lit_mult.diagnostics.parts import Reading, matrices, parts, rms, trainable_parts
from lit_mult.registry.kinds import Axis

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def norms(model: nn.Module) -> Iterator[Reading]:
    """weight_rms, row_rms, column_rms, norm_rms; scalar_value and norm_value where there is one number; effective_rms.

    A tied head has the weight_rms of the embedding, and an effective_rms of its own.
    """
    for part in parts(model):
        if part.parameter.ndim:
            yield part.key("norms", "rms"), rms(part.parameter)
        else:
            yield part.key("norms", "value"), part.parameter.detach().float()
    for name, matrix in matrices(model):
        yield (
            MetricKey("norms", "effective_rms", name, layer_of(name), matrix.role.value),
            rms(matrix.effective_weight()),
        )


def line_norms(model: nn.Module) -> Iterator[Reading]:
    """Distribution of the norms of rows and of columns of every effective matrix (arXiv:2601.04890 fig. 3).

    row_norm_mean and column_norm_mean are the mean over the matrix; row_norm_q0, q5, q25, q50, q75, q95 and q100 are
    quantiles of the norms over that mean, and row_norm_log_std is the (population) standard deviation of their log.
    """
    for name, matrix in matrices(model):
        weight = matrix.effective_weight().float()
        for line, dim in ((Axis.ROW, 1), (Axis.COLUMN, 0)):
            norm = torch.linalg.vector_norm(weight, dim=dim) / weight.shape[dim] ** 0.5
            mean = norm.mean()
            values = {"mean": mean, "log_std": norm.log().std(correction=0)}
            quantiles = torch.quantile(norm / mean, norm.new_tensor(QUANTILES))
            values |= {f"q{round(100 * q)}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
            for what, value in values.items():
                yield MetricKey("rows", f"{line}_norm_{what}", name, layer_of(name), matrix.role.value), value


def snapshot(model: nn.Module) -> dict[int, Tensor]:
    """A copy of every parameter, by the identity of the parameter."""
    return {id(part.parameter): part.parameter.detach().clone() for part in parts(model)}


def relative_updates(model: nn.Module, before: Mapping[int, Tensor]) -> Iterator[Reading]:
    """‖after - before‖ / ‖before‖ of every parameter (weight_update, row_update, ...) and effective matrix.

    `before` is the `snapshot` of the model that is compared with.
    """
    for part in trainable_parts(model):
        yield part.key("updates", "update"), _relative(part.parameter, before[id(part.parameter)])
    for name, matrix in matrices(model):
        multipliers = {axis.value: before[id(part)] for axis, part in matrix.multipliers.items()}
        old = matrix.formula.effective_weight(before[id(matrix.weight)], matrix.constant, **multipliers)
        key = MetricKey("updates", "effective_update", name, layer_of(name), matrix.role.value)
        yield key, _relative(matrix.effective_weight(), old)


def _relative(after: Tensor, before: Tensor) -> Tensor:
    before = before.float()
    return rms(after.float() - before) / rms(before)
