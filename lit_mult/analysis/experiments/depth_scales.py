"""Block outputs and learned scalars over depth, with and without a scalar on every matrix (arXiv:2601.04890 fig. 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis.drawing import Figure, draw_means, in_octaves, line_styles, panel_grid, styled
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import optimizer_name
from lit_mult.analysis.seeds import geometric_means, means_over_seeds, paired, slopes
from lit_mult.analysis.tables import means_table, signed
from lit_mult.analysis.verdict import ABOVE_0, Verdict, judge

_LOOKS: dict[str, dict[str, Any]] = {"none": {"ls": "--", "mfc": "white"}, "scalars": {"ls": "-"}}
_ATTENTION, _MLP = "attention output", "MLP output"
_OUTPUTS = {"attention_output_rms": _ATTENTION, "mlp_output_rms": _MLP}
_MLP_ROLES = ("gate_proj", "up_proj", "down_proj")
_GROUPS = {
    "out of a block": ["o_proj", "down_proj"],
    "inside a block": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
}
_DEAD = 0.01
"""Output over that of the baseline at equal layer and seed, below which a sublayer is dead: what adds less than 1 % of
what it adds without scalars is turned off, and how far its logarithm is down says nothing of growth with depth."""
_ENOUGH = 0.5
"""Share of a seed's layers that must be alive: over fewer, a slope is one over a part of the depth."""
_CAPTION = """\
RMS of block outputs (top) with and without a scalar on every matrix, and the learned scalars of the matrices out of \
a block (middle) and inside it (bottom), against layer at the end of training, as in fig. 2 of the paper. Geometric \
means over seeds; bars are 95 % intervals."""
_HOW_TO_READ = """\
- Slopes are least-squares slopes of a natural logarithm against layer: 0.1 is a factor of 1.105 a layer. Output
  ratios are those of the two arms at equal seed and layer.
- A slope of a ratio is above 0, too, where outputs of the first blocks shrink instead of those of the last growing.
- A sublayer is *dead* where its output with scalars is below {dead:g} of that without, at equal layer and seed. Dead
  ones and their scalars are left out of slopes and verdicts, not of the figure; a claim is not tested where less than
  {enough:g} of a seed's layers remain.
- Scalars of which the product alone acts, and that start equal, stay equal: query and key, value and out, up and down.
- The spread over seeds, with which the spread over layers is compared, is one number for all seeds; its own error is
  not in the interval.
"""


def findings(evidence: Evidence) -> Findings:
    """Slopes of outputs and scalars over depth, and whether scalars differ between layers more than between seeds."""
    evidence.expect(_LOOKS, ["optimizer"])
    ends = evidence.at_end(*_OUTPUTS, "scalar_value").dropna(subset="layer")
    ends = ends.assign(what=ends["quantity"].map(_OUTPUTS).fillna(ends["role"]), log=np.log(ends["value"].abs()))
    outputs, scalars = ends[ends["quantity"].isin(_OUTPUTS)], ends[ends["quantity"] == "scalar_value"]
    ratios = paired(outputs, "scalars", "none", ["optimizer", "what", "seed", "layer"], "log")
    ratios = ratios.assign(dead=ratios["log"] < math.log(_DEAD))  # not those of diverged runs, which are NaN
    growth, scalars = _growth(ratios), _with_dead(scalars, ratios)
    by_seed = [growth.assign(what=growth["what"] + ", scalars / none")]
    by_seed += [slopes(scalars[~scalars["dead"]], ["optimizer", "what", "seed"], "layer")]
    slope = means_over_seeds(pd.concat(by_seed), ["optimizer", "what"], "slope")
    shown = slope.assign(optimizer=slope["optimizer"].map(optimizer_name)).rename(columns={"what": "scale"})
    means = geometric_means(ends, ["optimizer", "arm", "what", "layer"])
    found = Findings(
        tables={"means": means, "slopes": slope, "dead": _dead(ratios)},
        display_tables={"slopes": means_table(shown, ["optimizer", "scale", "slope"], signed)},
        figures={"depth_scales": _figure(means)},
        captions={"depth_scales": _CAPTION},
        statements={"Dead sublayers": list(_dead_sentences(ratios))},
        how_to_read=_HOW_TO_READ.format(dead=_DEAD, enough=_ENOUGH),
        unit="Slopes of natural logarithms per layer",
    )
    return evidence.with_verdicts(found, [*_growing(growth), *_patterned(scalars)])


def _growth(ratios: pd.DataFrame) -> pd.DataFrame:
    """Columns optimizer, what, seed, slope of the log ratio over the layers that are not dead, alive (their share).

    The slope is NaN where fewer than two such layers remain.
    """
    by = ["optimizer", "what", "seed"]
    alive = (~ratios["dead"]).groupby([ratios[name] for name in by], sort=False).mean().rename("alive").reset_index()
    return alive.merge(slopes(ratios[~ratios["dead"]], by, "layer"), on=by, how="left")


def _with_dead(scalars: pd.DataFrame, ratios: pd.DataFrame) -> pd.DataFrame:
    """The scalars with column dead: whether their sublayer is. Without a baseline none is known to be."""
    outputs = np.where(scalars["role"].isin(_MLP_ROLES), _MLP, _ATTENTION)
    place = ["optimizer", "seed", "layer"]
    flags = ratios[[*place, "what", "dead"]].rename(columns={"what": "output"})
    merged = scalars.assign(output=outputs).merge(flags, on=[*place, "output"], how="left")
    return merged.assign(dead=merged["dead"].eq(True))


def _dead(ratios: pd.DataFrame) -> pd.DataFrame:
    """The dead sublayers: optimizer, what, layer, seed, ratio."""
    dead = ratios[ratios["dead"]]
    return dead[["optimizer", "what", "layer", "seed"]].assign(ratio=np.exp(dead["log"]))


def _dead_sentences(ratios: pd.DataFrame) -> Iterator[str]:
    """Which sublayers are dead, a sentence a kind of output and optimizer."""
    for (what, optimizer), group in ratios.groupby(["what", "optimizer"], sort=False):
        dead = group[group["dead"]].sort_values(["layer", "seed"])
        by_layer = [
            f"layer {layer} (seed {', '.join(map(str, of_layer['seed']))})" for layer, of_layer in dead.groupby("layer")
        ]
        which = f": {', '.join(by_layer)}" if by_layer else ""
        where = f"{what}, {optimizer_name(str(optimizer))}"
        yield f"{where}: {len(dead)} of {len(group)} (layer, seed) pairs have below {_DEAD:g} of the baseline{which}."


def _growing(growth: pd.DataFrame) -> Iterator[Verdict]:
    for (what, optimizer), group in growth.groupby(["what", "optimizer"], sort=False):
        where = f"{what}, {optimizer_name(str(optimizer))}"
        claim = f"Block outputs grow with depth relative to the baseline, as in fig. 2 ({where})"
        statistic = "Slope of ln(‖output‖ with scalars / without) per layer, over the layers that are not dead"
        yield judge(claim, statistic, group["slope"], ABOVE_0, tested=group["alive"].min() >= _ENOUGH)


def _patterned(scalars: pd.DataFrame) -> Iterator[Verdict]:
    # The digest names a pattern but neither its sign nor its shape: what any pattern implies is claimed, that layers
    # differ by more than chance does, which is as much as one layer differs between seeds.
    for group, roles in _GROUPS.items():
        for optimizer, chosen in scalars[scalars["role"].isin(roles)].groupby("optimizer", sort=False):
            alive = 1 - chosen.groupby(["role", "seed"])["dead"].mean()
            chosen = chosen.assign(log=chosen["log"].mask(chosen["dead"]))
            table = chosen.pivot(index=["role", "layer"], columns="seed", values="log")
            over_seeds = np.sqrt(table.var(axis=1).mean())
            over_layers = np.sqrt(table.groupby("role").var().mean())
            claim = f"Scalars {group} have a pattern over depth, as in fig. 2 ({optimizer_name(str(optimizer))})"
            statistic = "Standard deviation of ln(scalar) over layers / over seeds"
            yield judge(claim, statistic, over_layers / over_seeds, (1.0, np.inf), tested=alive.min() >= _ENOUGH)


@styled
def _figure(means: pd.DataFrame) -> Figure:
    from matplotlib.ticker import MaxNLocator

    optimizers = list(means["optimizer"].unique())
    figure, axes = panel_grid(3, len(optimizers), 1.9, wide=True, sharex=True, sharey="row", xlabel="layer")
    panels = {"RMS of block outputs": [*_OUTPUTS.values()]}
    panels |= {f"scalars {group}": roles for group, roles in _GROUPS.items()}
    for (label, lines), across in zip(panels.items(), axes, strict=True):
        styles = line_styles(lines)
        for optimizer, ax in zip(optimizers, across, strict=True):
            of_optimizer = means[(means["optimizer"] == optimizer) & means["what"].isin(lines)]
            for (what, arm), line in of_optimizer.groupby(["what", "arm"], sort=False):
                both = what in _OUTPUTS.values()  # arms; of scalars there is one, and dashes tell equal lines apart
                look = styles[str(what)] | (_LOOKS[str(arm)] if both else {})
                name = f"{what}, {arm}" if both else what
                draw_means(ax, line["layer"].to_numpy(float), line, "value", look | {"label": name})
        in_octaves(across[0])
        across[0].set_ylabel(label)
        # An optimizer may lack an arm as yet: the legend is of what any panel of the row shows.
        named = [ax.get_legend_handles_labels() for ax in across]
        entries = {name: handle for handles, names in named for handle, name in zip(handles, names, strict=True)}
        across[-1].legend(entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for optimizer, ax in zip(optimizers, axes[0], strict=True):
        ax.set_title(optimizer_name(optimizer))
    return figure
