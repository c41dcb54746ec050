"""Figures in their styles: nothing overlaps, settings of the user count, legends say what arms are."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from record_data import make_record
from test_analysis_report import small_study

from lit_mult.analysis import drawing, plots, sensitivity, styles
from lit_mult.analysis.arms import arm_labels
from lit_mult.analysis.frame import load_records
from lit_mult.config import RunConfig
from lit_mult.errors import UserError
from lit_mult.schema import CellInfo


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("study")
    small_study(folder, seeds=2)
    return load_records(folder)


def drawn(runs: pd.DataFrame) -> dict[str, Figure]:
    points, labels = sensitivity.points(runs), arm_labels(runs)
    return {
        "loss_vs_lr": plots.loss_vs_lr(runs, points, labels),
        "sensitivity": plots.sensitivity(points, labels),
        "adam_vs_muon": plots.adam_vs_muon(points, sensitivity.paired_differences(points), labels),
        "optimum_drift": plots.optimum_drift(points, sensitivity.optimum_drift(points)),
    }


def texts(figure: Figure) -> dict[str, Bbox]:
    """Where the texts of a figure stand, but for those of ticks, some of which are not drawn."""
    figure.draw_without_rendering()
    figure.draw_without_rendering()  # the layout takes a second pass to settle
    of_axes = {text for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for text in axis.findobj(Text)}
    of_axes -= {axis.label for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)}
    shown = [text for text in figure.findobj(Text) if text not in of_axes and text.get_text() and text.get_visible()]
    return {f"{number} {text.get_text()}": text.get_window_extent() for number, text in enumerate(shown)}


@pytest.mark.parametrize(
    ("style", "width"), [("paper", "page"), ("paper", "column"), ("talk", "page"), ("poster", "page")]
)
def test_no_texts_overlap_or_leave_the_figure(runs: pd.DataFrame, style: styles.StyleName, width: styles.Width) -> None:
    with styles.figure_style(style, width):
        for name, figure in drawn(runs).items():
            found = texts(figure)
            assert len(found) > 4
            pairs = combinations(found.items(), 2)
            assert not [(name, one, other) for (one, a), (other, b) in pairs if a.padded(-1).overlaps(b.padded(-1))]
            whole = figure.bbox.padded(1)
            assert not [(name, text) for text, box in found.items() if not all(map(whole.contains, *box.corners().T))]


def test_legends_stay_inside_the_file_which_has_more_dots_an_inch() -> None:
    with styles.figure_style("paper"):
        for letters in (5, 13, 20, 28, 36):
            figure, _ = drawing.panel_grid(1, 2, 2.0)
            drawing.mark_legend(figure, [(f"{arm}{'n' * letters}", {"color": "k", "ls": "-"}) for arm in range(4)])
            for dpi in (figure.dpi, mpl.rcParams["savefig.dpi"]):
                figure.set_dpi(dpi)
                figure.draw_without_rendering()
                (legend,) = figure.legends
                box = legend.get_window_extent()
                assert box.x0 >= 0, (letters, dpi)
                assert box.x1 <= figure.bbox.width, (letters, dpi)


def test_figures_are_as_wide_as_a_page_or_a_column_has_room_for(runs: pd.DataFrame) -> None:
    points = sensitivity.points(runs)
    inches = {}
    for width in ("page", "column"):
        with styles.figure_style("paper", width):
            inches[width] = plots.sensitivity(points).get_figwidth()
    assert inches == {"page": pytest.approx(1.0 + 2 * 2.4), "column": pytest.approx(3.25)}


def test_a_talk_has_larger_type_and_thicker_lines_in_proportion(runs: pd.DataFrame) -> None:
    points = sensitivity.points(runs)
    paper = plots.loss_vs_lr(runs, points)
    with styles.figure_style("talk"):
        talk = plots.loss_vs_lr(runs, points)
    # 13 points of type against 8, lines of 2.4 points against 1.3, markers of 7 against 4; stars of 7 against 4, too.
    assert talk.axes[0].title.get_size() / paper.axes[0].title.get_size() == pytest.approx(13 / 8)
    for one, other in zip(paper.axes[0].lines, talk.axes[0].lines, strict=True):
        assert other.get_linewidth() / one.get_linewidth() == pytest.approx(2.4 / 1.3)
        assert other.get_markersize() / one.get_markersize() == pytest.approx(7 / 4)


def test_settings_of_the_user_count(runs: pd.DataFrame) -> None:
    points = sensitivity.points(runs)
    with mpl.rc_context({"font.size": 11, "axes.titlesize": "medium", "lines.linewidth": 3.0}):
        with styles.figure_style(None):
            own = plots.loss_vs_lr(runs, points)
        paper = plots.loss_vs_lr(runs, points)
    with styles.figure_style("paper"), mpl.rc_context({"axes.titlesize": 9}):
        changed = plots.loss_vs_lr(runs, points)
    assert [figure.axes[0].title.get_size() for figure in (own, paper, changed)] == [11, 8, 9]
    assert max(line.get_linewidth() for line in own.axes[0].lines) == 3.0


def test_global_settings_stay(runs: pd.DataFrame) -> None:
    before = dict(mpl.rcParams)
    with styles.figure_style("poster"):
        plots.loss_vs_lr(runs, sensitivity.points(runs))
    assert dict(mpl.rcParams) == before


def test_the_sheets_are_those_of_matplotlib_too() -> None:
    import matplotlib.pyplot as plt

    with plt.style.context(["lit_mult.analysis.styles.lit_mult", "lit_mult.analysis.styles.talk"]):
        by_name = {name: mpl.rcParams[name] for name in ("font.size", "axes.prop_cycle", "legend.frameon")}
    with styles.figure_style("talk"):
        assert {name: mpl.rcParams[name] for name in by_name} == by_name


@pytest.mark.parametrize(("arguments", "problem"), [(("slides",), "style: slides"), (("paper", "half"), "width: half")])
def test_an_unknown_style_names_those_that_are(arguments: tuple[str, ...], problem: str) -> None:
    with pytest.raises(UserError, match=f"{problem}: must be one of "), styles.figure_style(*arguments):  # type: ignore[arg-type]
        pass


def test_settings_of_one_width_stand_side_by_side(tmp_path: Path) -> None:
    small_study(tmp_path, seeds=1)
    runs = load_records(tmp_path).query("d_model == 32").reset_index(drop=True)
    points = sensitivity.points(runs)
    figure = plots.loss_vs_lr(runs, points)
    assert [ax.get_title() for ax in figure.axes] == ["AdamW, $d$ = 32", "Muon, $d$ = 32"]
    assert len({ax.get_subplotspec().rowspan.start for ax in figure.axes}) == 1  # type: ignore[union-attr]


ARMS = {
    "muP": {"multipliers": "fixed"},
    "muP-tuned": {
        "multipliers": "fixed",
        "parametrization.lr": {"q_proj": 2.0},
        "optim.weight_decay_mode": "corrected",
    },
    "vectors": {"multipliers": "vector"},
    "attention": {"multipliers": "vector", "placement.overrides": {"embed_tokens": "none", "layers.*.mlp.*": "none"}},
    "CompleteP": {"multipliers": "fixed", "parametrization.depth_rule": "completep"},
    "Muon-vectors": {"multipliers": "vector", "optimizer": "muon"},
}
LABELS = {
    "muP": "muP: fixed multipliers, AdamW",
    "muP-tuned": "muP-tuned: fixed multipliers, AdamW, corrected decay, rates by role",
    "vectors": "vectors: learnable row + column multipliers, AdamW",
    "attention": "attention: learnable row + column multipliers, AdamW, none on embed_tokens, layers.*.mlp.*",
    "CompleteP": "CompleteP: fixed multipliers, AdamW",
    "Muon-vectors": "Muon-vectors: learnable row + column multipliers",
}


def study_of(folder: Path, arms: dict[str, dict[str, object]]) -> pd.DataFrame:
    for arm, settings in arms.items():
        config = RunConfig.from_dict({"parametrization": {"rule": "mup"}}).with_overrides(settings)
        cell = CellInfo(study="demo", cell=arm, arm=arm, sampler="grid", factors={}, nuisance={"optim.lr": 2**-6})
        path = folder / "records" / f"{arm}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_record(config, 2.0, cell=cell).write(path)
    return load_records(folder)


def test_legends_say_what_arms_differ_in(tmp_path: Path) -> None:
    assert arm_labels(study_of(tmp_path, ARMS)) == LABELS


def test_what_all_arms_share_is_not_said(tmp_path: Path) -> None:
    placed = {name: ARMS[name] for name in ("vectors", "attention")}
    assert arm_labels(study_of(tmp_path / "placed", placed)) == {
        "vectors": "vectors",
        "attention": "attention: none on embed_tokens, layers.*.mlp.*",
    }
    decays = {name: {"optim.weight_decay": decay} for name, decay in (("strong", 0.4), ("weak", 0.1))}
    assert arm_labels(study_of(tmp_path / "decays", decays)) == {  # type: ignore[arg-type]
        "strong": "strong: weight decay 0.4",
        "weak": "weak: weight decay 0.1",
    }
    alone = {"softplus": {"multipliers": "softplus"}}
    assert arm_labels(study_of(tmp_path / "alone", alone)) == {"softplus": "softplus: softplus gains"}  # type: ignore[arg-type]


def test_dots_stand_for_words_that_are_too_many(tmp_path: Path) -> None:
    many = {"placement.overrides": {f"layers.{layer}.mlp.*": "none" for layer in range(6)}}
    vectors = {"multipliers": "vector"}
    named = arm_labels(study_of(tmp_path / "one", {"all": vectors, "few": vectors | many}))
    assert named == {"all": "all", "few": f"few: none on {', '.join(f'layers.{layer}.mlp.*' for layer in range(6))}"}
    many |= {"optim.weight_decay": 0.4, "multipliers": "scalar"}
    named = arm_labels(study_of(tmp_path / "more", {"all": vectors, "few": many}))
    assert named["few"] == "few: learnable scalar multipliers, …"


def test_the_legend_has_the_words_where_there_is_room(runs: pd.DataFrame) -> None:
    points = sensitivity.points(runs)
    words = {"muP": "muP: no multipliers", "vectors": "vectors: learnable row + column multipliers"}
    assert arm_labels(runs) == words

    def shown(labels: dict[str, str]) -> list[str]:
        (legend,) = plots.loss_vs_lr(runs, points, labels).legends
        return [text.get_text().replace("\n", " ") for text in legend.get_texts()][:2]

    assert shown(words) == list(words.values())
    assert shown(dict.fromkeys(words, "word " * 300)) == list(words)
