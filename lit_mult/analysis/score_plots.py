"""Figures of downstream scores: a panel a task, against the tokens trained on, and differences between arms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis import drawing
from lit_mult.analysis.drawing import OPTIMIZER_LOOKS, Axes, Figure, Mark, Styles, draw_means, panel_grid, styled
from lit_mult.analysis.frame import rows
from lit_mult.analysis.scores import AVERAGES
from lit_mult.registry.optimizers import OPTIMIZERS

_TINT = {"knowledge": "#0072B2", "reasoning": "#D55E00"}


@styled
def downstream(means: pd.DataFrame, differences: pd.DataFrame, labels: Mapping[str, str] | None = None) -> Figure:
    """Scores of each task and of the means over tasks (above), and differences between arms (below), with intervals.

    `means` and `differences` are those of one suite and one width; of `means`, the last checkpoints. `labels` has a
    text of the legend for arms, such as `arms.arm_labels`.
    """
    tasks = list(means["task"].unique())
    position = {task: number + 0.7 * (task in AVERAGES) for number, task in enumerate(tasks)}
    compared = differences.drop_duplicates(["of", "against", "within"])
    figure, axes = panel_grid(2 if len(compared) else 1, 1, 2.7, wide=True)
    styles, lines = drawing.arm_styles(means), list(means["label"].unique())
    top = axes[0, 0]
    for number, (_, line) in enumerate(means.groupby("label", sort=False)):
        first = next(rows(line))
        x = np.array([position[task] for task in line["task"]]) + _beside(number, len(lines))
        look = _look(styles, first.arm, first.optimizer)
        draw_means(top, x, line, "value", look | {"ls": "none"})
    for row in rows(means.drop_duplicates("task")):
        if not np.isnan(row.chance):
            top.hlines(row.chance, position[row.task] - 0.4, position[row.task] + 0.4, color="0.4", lw=0.9, ls=":")
    top.set(ylabel="score", ylim=(0, 1.03))
    if len(compared):
        compared_marks = _difference_panel(axes[1, 0], differences, compared, position)
    for ax in axes[:, 0]:
        _name_tasks(ax, means, position)
    marks: list[Mark] = [("chance", {"color": "0.4", "ls": ":"})]
    marks += [(name, mark | {"ls": "none"}) for name, mark in _optimizer_marks(means)]
    points_only = {arm: style | {"ls": "none"} for arm, style in styles.items()}
    drawing.add_legend(figure, means, points_only, marks, loc="outside upper center", labels=labels)
    if len(compared):
        drawing.mark_legend(figure, compared_marks)
    return figure


@styled
def scores_along_training(means: pd.DataFrame, labels: Mapping[str, str] | None = None) -> Figure:
    """Means over tasks against the tokens trained on (arXiv:2601.04890 fig. 11): a panel a mean, a line an arm.

    `means` are those of one suite and one width, of several checkpoints. A suite of one task shows that. For `labels`,
    see `downstream`.
    """
    from matplotlib.ticker import EngFormatter

    shown = [name for name in AVERAGES if name in set(means["task"])] or list(means["task"].unique())[:3]
    figure, axes = panel_grid(1, len(shown), 2.3, xlabel="training tokens", ylabel="score")
    styles = drawing.arm_styles(means)
    for name, ax in zip(shown, axes[0], strict=True):
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        for _, line in means[means["task"] == name].groupby("label", sort=False):
            first = next(rows(line))
            look, line = _look(styles, first.arm, first.optimizer), line.sort_values("tokens")
            drawing.draw_band(ax, line["tokens"], line, "value", look)
        ax.set_title("mean over all tasks" if name == "average" else name)
    drawing.add_legend(figure, means, styles, _optimizer_marks(means), labels=labels)
    return figure


def _optimizer_marks(means: pd.DataFrame) -> list[Mark]:
    """Entries of a legend, where there are several optimizers to tell apart."""
    shown = set(means["optimizer"])
    optimizers = [name for name in (*OPTIMIZERS, *sorted(shown - set(OPTIMIZERS))) if name in shown]
    return drawing.optimizer_marks(optimizers) if len(optimizers) > 1 else []


def _difference_panel(
    ax: Axes, differences: pd.DataFrame, compared: pd.DataFrame, position: dict[str, float]
) -> list[Mark]:
    """Draw the differences of scores; entries of a legend for them."""
    colours, marks = drawing.comparison_colours(len(compared)), list[Mark]()
    for number, row in enumerate(rows(compared)):
        line = differences.merge(pd.DataFrame([{"of": row.of, "against": row.against, "within": row.within}]))
        x = np.array([position[task] for task in line["task"]]) + _beside(number, len(compared))
        look: dict[str, Any] = {"color": colours[number], "marker": "osDvPh"[number % 6], "ls": "none", "ms": 4}
        draw_means(ax, x, line, "difference", look)
        marks.append((f"{row.of} - {row.against}{f' ({row.within})' if row.within else ''}", look))
    ax.axhline(0, color="0.3", lw=0.8)
    ax.set_ylabel("difference of scores")
    return marks


def _name_tasks(ax: Axes, means: pd.DataFrame, position: dict[str, float]) -> None:
    sides = means.drop_duplicates("task").set_index("task")["side"]
    names = [task.removeprefix("mini_").replace("_", " ") for task in position]
    ax.set_xticks(list(position.values()), names, rotation=25, ha="right", rotation_mode="anchor")
    ax.grid(visible=False, axis="x")
    ax.set_xlim(min(position.values()) - 0.6, max(position.values()) + 0.6)
    for task, at in position.items():
        if (tint := _TINT.get(str(sides[task]))) is not None:
            ax.axvspan(at - 0.5, at + 0.5, color=tint, alpha=0.06, lw=0)


def _look(styles: Styles, arm: str, optimizer: str) -> dict[str, Any]:
    style = styles[arm]
    return style | {"mfc": style["color"]} | OPTIMIZER_LOOKS[optimizer]


def _beside(number: int, of: int) -> float:
    return 0.16 * (number - (of - 1) / 2)
