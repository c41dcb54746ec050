"""Distribution of the row and column norms of matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lit_mult.diagnostics.group import Group, Moment
from lit_mult.diagnostics.parts import matrices
from lit_mult.diagnostics.readings import Reading
from lit_mult.registry.contracts import Axis

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Rows(Group):
    """Row and column norms of every effective matrix (arXiv:2601.04890 fig. 3).

    row_norm_mean and column_norm_mean: mean over the matrix. row_norm_q0, q5, q25, q50, q75, q95 and q100: quantiles of
    the norms over that mean. row_norm_log_std: (population) standard deviation of their logarithm.
    """

    def state(self, moment: Moment) -> Iterator[Reading]:
        for name, matrix in matrices(moment.model):
            weight = matrix.effective_weight().float()
            for line, dim in ((Axis.ROW, 1), (Axis.COLUMN, 0)):
                norm = torch.linalg.vector_norm(weight, dim=dim) / weight.shape[dim] ** 0.5
                mean = norm.mean()
                values = {"mean": mean, "log_std": norm.log().std(correction=0)}
                quantiles = torch.quantile(norm / mean, norm.new_tensor(QUANTILES))
                values |= {f"q{round(100 * q)}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
                for what, value in values.items():
                    yield Reading(f"{line}_norm_{what}", name, matrix.role.value, value)
