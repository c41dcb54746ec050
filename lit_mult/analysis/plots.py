"""Figures for a page or a column. Colours are Okabe and Ito's; line styles and markers distinguish arms in grey.

Each function returns a matplotlib Figure made without pyplot; `style.save` turns it into PNG and SVG.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis import drawing
from lit_mult.analysis.drawing import Axes, Figure, Mark, Styles, add_legend, arm_styles, panel_grid, styled
from lit_mult.analysis.frame import natural, rows
from lit_mult.analysis.labels import label_points
from lit_mult.analysis.seeds import Floats, mean_interval
from lit_mult.analysis.sensitivity import ALL_WIDTHS, MEASURES, lines, loss_curves, summary, with_optimum
from lit_mult.analysis.styles import grid_of, letters
from lit_mult.analysis.tables import NO_INTERVAL
from lit_mult.method.regime import BALANCED


@styled
def loss_vs_lr(runs: pd.DataFrame, points: pd.DataFrame, labels: Mapping[str, str] | None = None) -> Figure:
    """Final loss against learning rate: a row a setting, a column a width, a line an arm with its band over seeds.

    `labels` has a text of the legend for arms, such as `arms.arm_labels`; others have their names.

    The loss axis follows the bulk of the runs: a diverged run is a cross at the top, one above the axis a triangle.
    Shaded are rates at which lr * weight_decay * steps of hidden matrices stays below 2 in all arms (`method.regime`).
    """
    curves, styles = loss_curves(runs), arm_styles(points)
    panels = _rows_of_panels(points)
    single = len({width for row in panels for _, width in row}) == 1
    shared = False if single else "row"
    figure, axes = panel_grid(len(panels), max(map(len, panels)), 1.75, sharey=shared, ylabel=drawing.LOSS)
    above = shaded = False
    for in_row, row in zip(panels, axes, strict=True):
        drawn = pd.concat([_at(curves, setting=setting, d_model=width) for setting, width in in_row])
        for (setting, width), ax in zip(in_row, row, strict=False):
            curve, point = (_at(frame, setting=setting, d_model=width) for frame in (curves, points))
            low, high = _limits((curve if single else drawn)["loss"])
            above |= bool((curve["loss"] > high).any())
            drawing.entitle(ax, setting, f"$d$ = {width}")
            ax.set_ylim(low, high)
            ax.set_xscale("log", base=2)
            _loss_panel(ax, curve, point, styles)
            shaded |= _shade_short_runs(ax, _at(runs, setting=setting, d_model=width))
            if curve["lr"].nunique() == 1:  # the default limits of a log axis fail for a single value
                ax.set_xlim(curve["lr"].min() / 2, curve["lr"].max() * 2)
        for ax in row[len(in_row) :]:
            ax.set_axis_off()
    drawing.label_bottoms(axes, "learning rate")
    swept = points[~points["reference"]]
    marks: list[tuple[Mark, Any]] = [
        (("optimum", drawing.STAR | {"mfc": "0.6"}), (~swept["at_edge"] & swept["optimum_lr"].notna()).any()),
        (("optimum at the edge", drawing.STAR | {"mfc": "white"}), swept["at_edge"].any()),
        (drawing.DIVERGED, curves["diverged"].any()),
        (("above the axis", drawing.TRIANGLE | {"color": "0.3"}), above),
        ((f"lr · wd · steps < {BALANCED:g}", drawing.SHADE_MARK), shaded),
    ]
    add_legend(figure, points, styles, [mark for mark, present in marks if present], labels=labels)
    return figure


def _rows_of_panels(points: pd.DataFrame) -> list[list[tuple[str, int]]]:
    """(setting, width) of the panels of each row: those of a setting, or of several that have one width."""
    most = drawing.most_across()
    of_setting = [
        [(setting, int(width)) for width in sorted(points.loc[points["setting"] == setting, "d_model"].unique())]
        for setting in _settings(points)
    ]
    if points["d_model"].nunique() == 1:
        of_setting = [[panel for panels in of_setting for panel in panels]]
    return [panels[start : start + most] for panels in of_setting for start in range(0, len(panels), most)]


@styled
def sensitivity(points: pd.DataFrame, labels: Mapping[str, str] | None = None) -> Figure:
    """Learning-rate sensitivity (above) and best loss (below) against width: a column a setting, a line an arm.

    Settings that a page has no room for go on below. For `labels`, see `loss_vs_lr`.
    """
    means, styles, settings = summary(points), arm_styles(points), _settings(points)
    swept, others = (means.loc[means["reference"] == reference, "best_loss"] for reference in (False, True))
    # Untuned references far above would press the swept arms into one line.
    far = bool(others.max() - swept.max() > 4 * max(swept.max() - swept.min(), 0.05))
    across = min(len(settings), drawing.most_across())
    blocks = [settings[start : start + across] for start in range(0, len(settings), across)]
    figure, axes = panel_grid(2 * len(blocks), across, 1.9, sharey="row")
    for number, block in enumerate(blocks):
        tops, bottoms = axes[2 * number], axes[2 * number + 1]
        for setting, top, bottom in zip(block, tops, bottoms, strict=False):
            here = _at(means, setting=setting)
            for ax, measure in ((top, "sensitivity"), (bottom, "best_loss")):
                drawing.against_width(ax, here["d_model"])
                for arm, line in here.groupby("arm", sort=False):
                    _line(ax, line, measure, str(arm), styles)
            if here["sensitivity"].isna().all():
                _write(top, 0.5, "no complete sweep\nof learning rates")
            drawing.entitle(top, setting)
            if far:
                _references_above(bottom, here[here["reference"]], styles)
        for ax in (*tops[len(block) :], *bottoms[len(block) :]):
            ax.set_axis_off()
        if far:
            bottoms[0].set_ylim(*_limits(swept))
        tops[0].set_ylabel("lr sensitivity\n(nats per token)")
        bottoms[0].set_ylabel("best loss\n(nats per token)")
    drawing.label_bottoms(axes, "width $d$")
    add_legend(figure, points, styles, labels=labels)
    return figure


_COMPARED = ("adamw", "muon")


@styled
def adam_vs_muon(points: pd.DataFrame, differences: pd.DataFrame, labels: Mapping[str, str] | None = None) -> Figure:
    """Best loss under both optimizers against width, and their difference at equal arm and seed: a row a variant.

    For `labels`, see `loss_vs_lr`.
    """
    points = points[~points["reference"]]
    means, styles, pairs = summary(points), arm_styles(points), optimizer_pairs(points, differences)
    variants = list(means["variant"].unique())
    figure, axes = panel_grid(len(variants), 2, 2.1, sharex="row", ylabel=f"best {drawing.LOSS}")
    for variant, (left, right) in zip(variants, axes, strict=True):
        here = _at(means, variant=variant)
        for ax in (left, right):
            drawing.against_width(ax, here["d_model"])
            drawing.entitle(ax, variant)
        for arm in here["arm"].unique():
            for optimizer in _COMPARED:
                line = _at(here, arm=arm, optimizer=optimizer)
                _line(left, line, "best_loss", arm, styles, drawing.OPTIMIZER_LOOKS[optimizer])
            name = f"{arm} · {variant}" if variant else arm
            _line(right, _at(pairs, within=name), "difference", arm, styles)
        right.axhline(0, color="0.3", lw=0.8)
        right.set_ylabel("Muon - AdamW\n(nats per token)")
    drawing.label_bottoms(axes, "width $d$")
    add_legend(figure, points, styles, drawing.optimizer_marks(_COMPARED), labels=labels)
    return figure


def optimizer_pairs(points: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """Rows of `paired_differences` that `adam_vs_muon` shows: Muon minus AdamW in best loss, swept arms, each width."""
    pairs = _at(differences, between="optimizer", measure="best_loss", of="Muon", against="AdamW")
    pairs = pairs[(pairs["d_model"] != ALL_WIDTHS) & pairs["within"].isin(lines(points[~points["reference"]]))]
    return pairs.rename(columns={"low": "difference_low", "high": "difference_high"})


@styled
def answers_along_factors(answers: pd.DataFrame) -> Figure:
    """Differences that a study asks about along its numeric factors (`questions.along_factors`), with intervals.

    A row a factor and question, a column a measure. Below the values: decay times of hidden matrices at the best rates.
    """
    places = answers[["factor", "question"]].drop_duplicates()
    measures = list(answers["measure"].unique())
    figure, axes = panel_grid(len(places), len(measures), 2.3)
    names = list(answers["within"].unique())
    styles = drawing.line_styles(names) if len(names) > 1 else {names[0]: drawing.line_styles(["", "", "all"])["all"]}
    for place, row in zip(rows(places), axes, strict=True):
        for measure, ax in zip(measures, row, strict=True):
            here = _at(answers, factor=place.factor, question=place.question, measure=measure)
            values = np.sort(here["value"].unique())
            for number, (within, line) in enumerate(here.sort_values("value").groupby("within", sort=False)):
                at = np.searchsorted(values, line["value"]) + 0.06 * number
                drawing.draw_means(ax, at, line, "difference", styles[str(within)])
            times = here.groupby("value").agg(low=("times_low", "min"), high=("times_high", "max"))
            ax.set_xticks(range(len(values)), [_with_times(row) for row in rows(times)])
            ax.axhline(0, color="0.3", lw=0.8)
            drawing.entitle(ax, place.question, MEASURES[measure])
            ax.set_xlabel(f"{place.factor}\n(decay times)")
        row[0].set_ylabel("difference\n(nats per token)")
    drawing.mark_legend(figure, [(name, look) for name, look in styles.items() if name])
    return figure


def _with_times(row: Any) -> str:
    times = dict.fromkeys(f"{end:.2g}" for end in (row.low, row.high) if np.isfinite(end))
    return f"{row.Index:g}" + (f"\n({'-'.join(times)})" if times else "")


@styled
def optimum_drift(points: pd.DataFrame, drift: pd.DataFrame) -> Figure:
    """Optimal learning rate against width with its least-squares line; hollow where an optimum is at the edge."""
    points = with_optimum(points)
    styles = arm_styles(points)
    points = points.assign(log2_lr=np.log2(points["optimum_lr"]))
    figure, panels = _panels(points, "width $d$", "optimal learning rate", 2.0)
    for setting, ax, here in panels:
        drawing.against_width(ax, here["d_model"])
        ax.yaxis.set_major_formatter(lambda y, _: f"$2^{{{y:g}}}$")  # a log axis has one tick an octave: too few
        for arm, line in here.groupby("arm", sort=False):
            style = styles[str(arm)]
            slopes = _at(drift, setting=setting, arm=arm)
            for width, group in line.groupby("d_model"):
                x = drawing.beside(float(str(width)), str(arm), styles)
                face = "white" if group["optimum_at_edge"].any() else style["color"]
                ax.plot(x, group["log2_lr"].mean(), **style | {"ls": "none", "mfc": face, "ms": 5})
                if len(group) > 1:
                    ax.plot(np.full(len(group), x), group["log2_lr"], ".", color=style["color"], ms=3, alpha=0.5)
            ends = np.array([line["d_model"].min(), line["d_model"].max()], dtype=float)
            for row in rows(slopes):
                ax.plot(ends, row.intercept + row.slope * np.log2(ends), **style | {"marker": ""})
            ax.plot([], [], **style, label=_slope_label(str(arm), slopes, letters(ax) - 6))
    legends = [ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.2) for _, ax, _ in panels]
    _, down, _ = grid_of(panels[0][1])
    drawing.make_room(figure, down * max(legend.get_window_extent().height for legend in legends) / figure.dpi)
    return figure


@styled
def loss_vs_compute(bill: pd.DataFrame, labels: Mapping[str, str] | None = None) -> Figure:
    """Best loss against all FLOPs spent on it, search and tuning: a panel a setting, a line an arm across its widths.

    A thin line leads from the cost of the search alone to that with the tuning. Left out are reference arms that use no
    tuned preset, and arms whose tuning is not on record. For `labels`, see `loss_vs_lr`.
    """
    bill = bill[
        (~bill["reference"] | (bill["tuning_flops"] > 0)) & bill[["total_flops", "best_loss"]].notna().all(axis=1)
    ]
    styles = arm_styles(bill)
    figure, panels = _panels(bill, "training FLOPs of a seed", f"best {drawing.LOSS}", 2.7)
    ends = bill[["best_loss", "best_loss_low", "best_loss_high"]]
    low, high = ends.min(axis=1).min(), ends.max(axis=1).max()
    margin = 0.15 * max(high - low, 0.01)
    for _, ax, here in panels:
        ax.set_ylim(low - margin, high + margin)
        drawing.against_compute(ax, here["search_flops"].min(), here["total_flops"].max())
        for arm, line in here.groupby("arm", sort=False):
            style, x, y = styles[str(arm)], line["total_flops"].to_numpy(float), line["best_loss"].to_numpy(float)
            ax.hlines(y, line["search_flops"], x, color=style["color"], lw=0.7)
            ax.plot(line["search_flops"], y, "|", color=style["color"], ms=5)
            ax.plot(x, y, **style)
            _bars(ax, x, y, line, "best_loss", style)
        _name_widths(ax, here)
    add_legend(figure, bill, styles, labels=labels)
    return figure


def _panels(
    table: pd.DataFrame, xlabel: str, ylabel: str, height: float
) -> tuple[Figure, list[tuple[str, Axes, pd.DataFrame]]]:
    """One panel per setting, two in a row on a page and one in a column, with its rows of the table."""
    settings = _settings(table)
    across = min(len(settings), drawing.pairs_across())
    figure, axes = panel_grid(-(-len(settings) // across), across, height, sharey=True, ylabel=ylabel)
    for ax in axes.flat[len(settings) :]:
        ax.set_axis_off()
    panels = []
    for setting, ax in zip(settings, axes.flat, strict=False):
        drawing.entitle(ax, setting)
        ax.set_xlabel(xlabel)
        panels.append((setting, ax, _at(table, setting=setting)))
    return figure, panels


def _name_widths(ax: Axes, bill: pd.DataFrame) -> None:
    """Write the width beside its points, once for points of one width that lie close together."""
    bars = bill[["best_loss_low", "best_loss_high"]].T.fillna(bill["best_loss"]).T
    bill = bill.assign(low=bars["best_loss_low"], high=bars["best_loss_high"], x=np.log2(bill["total_flops"]))
    strokes = [line[["total_flops", "best_loss"]].to_numpy(float) for _, line in bill.groupby("arm")]
    for row in rows(bill):
        strokes.append(np.array([(row.search_flops, row.best_loss), (row.total_flops, row.best_loss)]))
        strokes.append(np.array([(row.total_flops, row.low), (row.total_flops, row.high)]))
    left, right = np.log2(ax.get_xlim())
    labels = []
    for width, group in bill.sort_values("x").groupby("d_model"):
        for _, near in group.groupby((group["x"].diff() > 0.08 * (right - left)).cumsum()):
            ends = [near[["total_flops", end]].to_numpy(float) for end in ("low", "high")]
            labels.append((f"$d$ = {width}", np.concatenate(ends)))
    label_points(ax, labels, strokes)


def _slope_label(arm: str, slopes: pd.DataFrame, letters: int) -> str:
    for row in rows(slopes):
        span = NO_INTERVAL if np.isnan(row.slope_low) else f"[{row.slope_low:+.2f}, {row.slope_high:+.2f}]"
        parts = (f"{arm}: slope {row.slope:+.2f}", f"{span}{'' if row.trusted else ' (doubtful)'}")
        return (", " if sum(map(len, parts)) < letters else "\n").join(parts)
    return f"{arm}: one width, no slope"


def _loss_panel(ax: Axes, curves: pd.DataFrame, points: pd.DataFrame, styles: Styles) -> None:
    _, high = ax.get_ylim()
    for number, (arm, curve) in enumerate(curves.groupby("arm", sort=False)):
        style = styles[str(arm)]
        if curve["reference"].any():
            ax.axhline(curve["loss"].mean(), **style | {"marker": ""})
            continue
        by_lr = curve.pivot(index="lr", columns="seed", values="loss")
        if curve["sampled"].any():  # neighbours differ in the other nuisance factors too: points, no curve
            ax.plot(by_lr.index, by_lr, **style | {"ls": "none", "ms": 3, "alpha": 0.7})
        else:
            _curve(ax, by_lr, style)
        y = 0.96 - 0.06 * number  # arms below one another, or their marks would cover each other
        for marked, mark in ((curve["diverged"] > 0, drawing.CROSS), (curve["loss"] > high, drawing.TRIANGLE)):
            if marked.any():
                drawing.mark_at_top(ax, curve.loc[marked, "lr"].unique(), y, style["color"], mark)
    _references_above(ax, points[points["reference"] & (points["best_loss"] > high)], styles)
    for arm, swept in points[~points["reference"]].groupby("arm", sort=False):
        face = "white" if swept["at_edge"].any() else styles[str(arm)]["color"]
        lr, loss = 2 ** np.log2(swept["optimum_lr"]).mean(), swept["optimum_loss"].mean()
        ax.plot(lr, loss, **drawing.STAR | {"mfc": face, "zorder": 5})


def _shade_short_runs(ax: Axes, runs: pd.DataFrame) -> bool:
    """Shade the rates whose runs end before the balance of noise and decay in all arms; whether there are any."""
    lowest, highest = ax.get_xlim()
    ends = [balanced_from(of_arm) for _, of_arm in runs.groupby("arm")]
    if not ends or (end := min(*ends, highest)) <= runs["lr"].min():
        return False
    ax.axvspan(lowest, end, **drawing.SHADE)
    ax.set_xlim(lowest, highest)
    return True


def balanced_from(runs: pd.DataFrame) -> float:
    """The learning rate from which on the runs of an arm reach the balance; 0 where all do."""
    short = runs.loc[runs["decay_times_hidden_low"] < BALANCED, ["lr", "decay_times_hidden_low"]]
    # Times grow with the rate, unless weight decay is independent of it.
    return 0.0 if short.empty else float((short["lr"] * BALANCED / short["decay_times_hidden_low"]).median())


def _curve(ax: Axes, by_lr: pd.DataFrame, style: Mapping[str, Any]) -> None:
    if by_lr.shape[1] > 1:
        ax.plot(by_lr.index, by_lr, ".", color=style["color"], ms=3, alpha=0.45)
        bands = np.array([mean_interval(losses[np.isfinite(losses)])[1:] for losses in by_lr.to_numpy()])
        ax.fill_between(by_lr.index, *bands.T, color=style["color"], alpha=0.18, lw=0)
    # Seeds of which one diverged have no mean: the line breaks there instead of following the survivors.
    ax.plot(by_lr.index, by_lr.mean(axis=1, skipna=False), **style)


def _references_above(ax: Axes, points: pd.DataFrame, styles: Styles) -> None:
    for number, (arm, loss) in enumerate(points.groupby("arm", sort=False)["best_loss"].mean().items()):
        _write(ax, 0.88 - 0.1 * number, f"{arm}: {loss:.2f} ↑", styles[str(arm)]["color"])


def _write(ax: Axes, y: float, text: str, colour: str = "black") -> None:
    ax.text(0.5, y, text, ha="center", va="center", color=colour, transform=ax.transAxes)


def _limits(losses: pd.Series) -> tuple[float, float]:
    """Limits of a loss axis: all values, or where some lie far off, thrice as far from the best as the median."""
    values = losses.dropna().to_numpy(float)
    if not len(values):
        return 0.0, 1.0
    low, middle, top = np.min(values), np.median(values), np.max(values)
    far = middle > low and top - low > 5 * (middle - low)
    span = max(3 * (middle - low) if far else top - low, 0.02)
    return float(low - 0.08 * span), float(low + 1.2 * span)


def _line(
    ax: Axes, line: pd.DataFrame, measure: str, arm: str, styles: Styles, look: Mapping[str, Any] | None = None
) -> None:
    line, style = line[line[measure].notna()], styles[arm] | dict(look or {})
    x, y = drawing.beside(line["d_model"].to_numpy(float), arm, styles), line[measure].to_numpy(float)
    ax.plot(x, y, **style)
    _bars(ax, x, y, line, measure, style)


def _bars(ax: Axes, x: Floats, y: Floats, line: pd.DataFrame, measure: str, style: Mapping[str, Any]) -> None:
    ends = line[[f"{measure}_low", f"{measure}_high"]].to_numpy(float).T
    if not np.isnan(ends).all():
        # The interval of equal values may miss their mean by a rounding error; bars must not be negative.
        ax.errorbar(x, y, yerr=np.abs(ends - y), fmt="none", ecolor=style["color"], elinewidth=0.9, capsize=2)


def _at(frame: pd.DataFrame, **values: Any) -> pd.DataFrame:
    for column, value in values.items():
        frame = frame[frame[column] == value]
    return frame


def _settings(points: pd.DataFrame) -> list[str]:
    return sorted(points["setting"].unique(), key=natural)
