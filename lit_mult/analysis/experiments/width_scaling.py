"""Learned scalars, logits and norms against width at one learning rate and decay (arXiv:2601.04890 sec. 4.2, fig. 5).

With muP's scaling left to the scalars they should fall as d^-1 (head) and d^-2 (query times key), slightly slower in
the paper, while norms of matrices and logits keep their size (its table 1, the row through the multiplier).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis.drawing import (
    Figure,
    against_width,
    draw_means,
    in_octaves,
    line_styles,
    pairs_across,
    panel_grid,
    styled,
)
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.exponents import larger_half
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.seeds import geometric_means, mean_logs, means_over_seeds, of_like_seeds, slopes
from lit_mult.analysis.tables import spanned
from lit_mult.analysis.verdict import judge
from lit_mult.registry.roles import HIDDEN_ROLES

# "Hardly change": ±0.1 is a factor of 1.23 over 8 times the width. Logits are the outcome of all scales together, so
# they get ±0.15 (1.37); without a scalar they would grow by a power of 1/2 at the least. "More slowly" than a power of
# -1 or -2: no steeper than it, and more than half of it, as half of it is another law, that of independent weights.
_CLAIMS: dict[str, tuple[str, float, float]] = {
    "‖W‖ of hidden matrices": ("Norms of hidden matrices hardly change with width", -0.1, 0.1),
    "‖W‖ of the head": ("The norm of the head's matrix hardly changes with width", -0.1, 0.1),
    "logits": ("Logits keep their size", -0.15, 0.15),
    "attention logits": ("Attention logits keep their size", -0.15, 0.15),
    "scalar of the head": ("The learned scalar of the head falls more slowly than d^-1", -1.0, -0.5),
    "query · key": ("The product of query and key scalars falls more slowly than d^-2", -2.0, -1.0),
}
_SCALES: dict[str, tuple[str, list[str]]] = {
    "scalar of the head": ("scalar_value", ["lm_head"]),
    "query · key": ("scalar_value", ["q_proj", "k_proj"]),
    "value · out": ("scalar_value", ["v_proj", "o_proj"]),
    "gate": ("scalar_value", ["gate_proj"]),
    "up · down": ("scalar_value", ["up_proj", "down_proj"]),
    "scalar of the embedding": ("scalar_value", ["embedding"]),
    "‖W‖ of hidden matrices": ("weight_rms", [*HIDDEN_ROLES]),
    "‖W‖ of the head": ("weight_rms", ["lm_head"]),
    "logits": ("logits_rms", []),
    "attention logits": ("attention_logits_rms", []),
}
"""Scale -> quantity and roles of the diagnostics (none: all); learned scalars of several roles are multiplied."""
_CAPTION = """\
Learned scalars of the head and of query times key (top), RMS of logits and norms of matrices (bottom) against width, \
at the end of training, as in fig. 5 of the paper: geometric means over layers and seeds; bars are 95 % intervals. \
Dotted: the powers of the width that muP sets by hand, through the point of the smallest width."""
_HOW_TO_READ = """\
- Exponents are least-squares slopes of log(value) against log(width), a seed by itself, with 95 % intervals. Claims are
  judged on all widths at the end; where a law holds in the limit only, the larger widths are nearer to it. The ranges
  are this project's: the paper says "slightly slower" than d^-1 and d^-2, and half of these powers is another law.
- Scalars still move when training ends, and the decay of the learning rate moves them again: exponents half way stand
  beside those at the end, and neither need be those of an equilibrium.
- A dot between roles is the product of their scalars, without its sign. Values are geometric means over layers, and
  for hidden matrices over roles. Of query and key the product of the scalars alone acts: starting equal, they stay so.
"""


def findings(evidence: Evidence) -> Findings:
    """Exponents of the width of every scalar, of norms and of logits."""
    evidence.expect(["scalars"], ["model.d_model"])
    quantities = {quantity for quantity, _ in _SCALES.values()}
    logs = _logs(evidence.at_end(*quantities))
    halfway = _logs(_halfway(evidence.readings[evidence.readings["quantity"].isin(quantities)]))
    larger = larger_half(logs["d_model"])
    by_seed = slopes(logs, ["what", "seed"], "log_width")
    exponents = means_over_seeds(by_seed, ["what"], "slope")
    for when, other in (("larger_widths", logs[logs["d_model"].isin(larger)]), ("halfway", halfway)):
        means = means_over_seeds(slopes(other, ["what", "seed"], "log_width"), ["what"], "slope")
        exponents = exponents.merge(means, on="what", how="left", suffixes=("", f"_{when}"))
    verdicts = [
        judge(f"{claim}, as in fig. 5", f"Exponent of the width, {what}", of_seed, (low, high))
        for what, (claim, low, high) in _CLAIMS.items()
        if len(of_seed := by_seed.loc[by_seed["what"] == what, "slope"])
    ]
    means = geometric_means(logs, ["what", "d_model"])
    left_out = ", ".join(map(str, sorted(set(evidence.runs["seed"]) - set(logs["seed"]))))
    found = Findings(
        tables={"means": means, "exponents": exponents},
        display_tables={"exponents": _display(exponents, larger[0])},
        figures={"width_scaling": _figure(means)},
        captions={"width_scaling": _CAPTION},
        warnings=[f"seeds without the widths of the others, left out: {left_out}"] if left_out else [],
        how_to_read=_HOW_TO_READ,
        unit="Exponents of the width",
    )
    return evidence.with_verdicts(found, verdicts)


def _halfway(readings: pd.DataFrame) -> pd.DataFrame:
    """Readings at the step, of those recorded, that is nearest to half of the last."""
    steps = readings["step"].unique()
    halfway: pd.DataFrame = readings[readings["step"] == steps[np.abs(steps - steps.max() / 2).argmin()]]
    return halfway


def _logs(readings: pd.DataFrame) -> pd.DataFrame:
    """Columns d_model, seed, log, what and log_width, over layers the mean; of the seeds that have the same widths."""
    alike = of_like_seeds(readings, "d_model")
    alike = alike.assign(log=np.log(alike["value"].abs()))
    parts = []
    for what, (quantity, roles) in _SCALES.items():
        chosen = alike[(alike["quantity"] == quantity) & (alike["role"].isin(roles) | (not roles))]
        run = ["d_model", "seed"]
        if quantity == "scalar_value":
            by_role = mean_logs(chosen, [*run, "role"]).groupby(run)["log"]
            part = by_role.agg(lambda logs: logs.sum(skipna=False)).reset_index()
        else:
            part = mean_logs(chosen, run)
        parts.append(part.assign(what=what))
    logs = pd.concat(parts, ignore_index=True)
    return logs.assign(log_width=np.log(logs["d_model"].astype(float)))


def _display(exponents: pd.DataFrame, larger: int) -> pd.DataFrame:
    fits = {"": "at the end", "_larger_widths": f"at the end, from width {larger}", "_halfway": "half way"}
    cells = []
    for row in exponents.to_dict("records"):
        judged = "{1:g} to {2:g}".format(*_CLAIMS[row["what"]]) if row["what"] in _CLAIMS else ""
        cell = {"scale": row["what"], "judged": judged, "seeds": str(row["seeds"])}
        for fit, name in fits.items():
            cell[name] = spanned(row[f"slope{fit}"], row[f"low{fit}"], row[f"high{fit}"])
        cells.append(cell)
    return pd.DataFrame(cells)


@styled
def _figure(means: pd.DataFrame) -> Figure:
    panels: dict[str, dict[str, int | None]] = {
        "learned scalar": {"scalar of the head": -1},
        "product of learned scalars": {"query · key": -2},
        "RMS": {"logits": None, "attention logits": None},
        "norm of the matrices": {"‖W‖ of hidden matrices": None, "‖W‖ of the head": None},
    }
    figure, axes = panel_grid(4 // pairs_across(), pairs_across(), 2.3, wide=True)
    for (label, lines), ax in zip(panels.items(), axes.flat, strict=True):
        against_width(ax, means["d_model"])
        styles = line_styles(lines)
        for what, power in lines.items():
            line = means[means["what"] == what].sort_values("d_model")
            look: dict[str, Any] = styles[what] | {"label": what}
            widths = line["d_model"].to_numpy(float)
            draw_means(ax, widths, line, "value", look)
            if power and len(line):
                guide = line["value"].iloc[0] * (widths / widths[0]) ** power
                ax.plot(widths, guide, color="0.4", ls=":", label=f"$d^{{{power}}}$")
        in_octaves(ax)
        ax.set(xlabel="width $d$", ylabel=label)
        ax.legend()
    return figure
