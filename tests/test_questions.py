"""Declared questions: differences by seed by hand, the correction, and what an interval covers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_analysis_frame import write_run

from lit_mult.analysis import plots, sensitivity
from lit_mult.analysis.frame import load_records
from lit_mult.analysis.questions import along_factors, answers, differences_by_seed, statement, unanswered
from lit_mult.analysis.seeds import Floats, holm
from lit_mult.schema import Question

LRS = [2**-8, 2**-6, 2**-4]


def ask(of: Any, against: Any, **more: Any) -> Question:
    return Question(of=of, against=against, **more)


@pytest.fixture
def runs(tmp_path: Path) -> pd.DataFrame:
    """Best losses by optimizer, arm, width (32 and 64) and seed; all at the middle rate."""
    best = {
        ("adamw", "muP"): {32: [2.0, 2.2, 2.1], 64: [1.8, 1.9, 1.9]},
        ("adamw", "vectors"): {32: [1.9, 2.1, 2.0], 64: [1.6, 1.8]},  # seed 2 lacks a width
        ("muon", "muP"): {32: [1.5, 1.5, 1.5], 64: [1.4, 1.4, 1.4]},
        ("muon", "vectors"): {32: [1.5, 1.5, 1.5], 64: [1.4, 1.4, 1.4]},
    }
    for (optimizer, arm), by_width in best.items():
        for width, losses in by_width.items():
            for seed, loss in enumerate(losses):
                for lr, extra in zip(LRS, (1.0, 0.0, 1.0), strict=True):
                    write_run(tmp_path, loss + extra, arm=arm, optimizer=optimizer, width=width, seed=seed, lr=lr)
    return load_records(tmp_path)


def test_a_question_is_asked_for_each_value_of_the_factors_it_leaves_open(runs: pd.DataFrame) -> None:
    found = differences_by_seed(runs, ask("vectors", "muP"))
    # AdamW: seed 0 (-0.1 - 0.2) / 2, seed 1 (-0.1 - 0.1) / 2.
    assert found["within"].tolist() == ["AdamW"] * 2 + ["Muon"] * 3
    assert found["seed"].tolist() == [0, 1, 0, 1, 2]
    assert found["difference"].tolist() == pytest.approx([-0.15, -0.1, 0, 0, 0])
    assert found["over"].unique().tolist() == ["widths 32, 64"]


def test_sides_may_fix_several_factors(runs: pd.DataFrame) -> None:
    question = ask({"arm": "muP", "optimizer": "muon"}, {"arm": "vectors", "optimizer": "adamw"}, over=[])
    found = differences_by_seed(runs, question)
    assert found["within"].tolist() == ["width 32"] * 3 + ["width 64"] * 2
    assert found["difference"].tolist() == pytest.approx([-0.4, -0.6, -0.5, -0.2, -0.4])


def test_a_question_without_a_pair_is_named(runs: pd.DataFrame) -> None:
    questions = [ask("vectors", "muP"), ask({"arm": "vectors", "optimizer": "muon"}, "tuned", measure="mean_loss")]
    table = answers(runs, questions)
    expected = "no answer on the mean loss over the rates, vectors under Muon - tuned: no seed has all runs of both"
    assert list(unanswered(table, questions)) == [f"{expected} sides yet"]


def test_answers_are_corrected_together(runs: pd.DataFrame) -> None:
    questions = [ask("vectors", "muP"), ask({"optimizer": "muon"}, {"optimizer": "adamw"}, over=["model.d_model"])]
    table = answers(runs, questions)
    assert table["within"].tolist() == ["AdamW", "Muon", "muP", "vectors"]
    assert table["p_holm"].tolist() == pytest.approx(holm(table["p"]).tolist())
    equal = table.iloc[1]  # the same losses under two names
    assert (equal["outcome"], equal["p"], equal["low"], equal["high"]) == ("equivalent", 1.0, 0.0, 0.0)
    muon = table.iloc[2]  # -0.45, -0.6, -0.55 over 3 seeds: t = -0.5333 / 0.0441 = -12.1, p = 0.0068; times 4
    assert muon["difference"] == pytest.approx(-1.6 / 3)
    assert muon["p"] == pytest.approx(0.00677, abs=1e-5)
    assert muon["outcome"] == "lower"
    assert statement(muon).startswith(
        "With Muon in place of AdamW (muP; widths 32, 64) the best loss is 0.5333 nats lower: 95 % interval [-0.7"
    )
    adamw = table.iloc[0]  # -0.15 and -0.1: with one degree of freedom, [-0.44, 0.19]
    assert adamw["outcome"] == "undecided"
    assert statement(adamw).startswith(
        "With vectors in place of muP (AdamW; widths 32, 64) the best loss is not shown to differ"
    )
    assert statement(adamw).endswith("2 seeds; differences up to 0.4427 remain possible.")
    apart = adamw.copy()
    apart[["low", "high", "p_holm"]] = -0.2, -0.01, 0.096
    assert statement(apart).endswith(
        "2 seeds, p = 0.096 after Holm's correction; differences up to 0.2000 remain possible."
    )


def test_answers_along_a_factor_of_three_numbers(tmp_path: Path) -> None:
    gains = {100: [0.0, 0.02], 400: [-0.1, -0.12], 1600: [-0.3, -0.3]}
    for steps, by_seed in gains.items():
        for seed, gain in enumerate(by_seed):
            for arm, more in (("muP", 0.0), ("vectors", gain)):
                for lr, extra in zip(LRS, (1.0, 0.0, 1.0), strict=True):
                    factors = {"train.steps": steps, "optim.weight_decay": 0.4}
                    cell = f"{arm}-{steps}-{lr}-{seed}"
                    write_run(tmp_path, 2 + more + extra, arm=arm, lr=lr, seed=seed, factors=factors, cell=cell)
    runs = load_records(tmp_path)
    found = along_factors(runs, [ask("vectors", "muP"), ask("vectors", "muP", over=["train.steps"])])
    assert found["factor"].tolist() == ["train.steps"] * 3  # not where they are averaged; one weight decay is no line
    assert found["value"].tolist() == [100, 400, 1600]
    assert found["difference"].tolist() == pytest.approx([0.01, -0.11, -0.3])
    assert found["within"].tolist() == [""] * 3
    # lr * weight_decay * steps between warmup (10 % of the steps) and final decay (16.7 %), at half the middle rate:
    # the width is twice the base width.
    assert found["times_low"].tolist() == pytest.approx([2**-7 * 0.4 * n for n in (73, 293, 1173)], rel=0.01)
    assert np.isfinite(found[["low", "high"]].to_numpy()).all()
    ticks = plots.answers_along_factors(found).axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["100\n(0.23)", "400\n(0.92)", "1600\n(3.7)"]


def test_a_doubtful_difference_is_undecided(tmp_path: Path) -> None:
    for seed in range(3):
        for arm, losses in (("muP", [3.0, 2.0, 3.0]), ("vectors", [3.0, 1.9, 1.0])):  # a best rate at the edge
            for lr, loss in zip(LRS, losses, strict=True):
                write_run(tmp_path, loss + 0.01 * seed, arm=arm, lr=lr, seed=seed)
    found = answers(load_records(tmp_path), [ask("vectors", "muP"), ask("vectors", "muP", measure="mean_loss")])
    assert found["outcome"].tolist() == ["undecided", "undecided"]
    assert found["doubtful"].tolist() == [3, 3]


def table_of(losses: Floats, arm: str) -> pd.DataFrame:
    """Rows as of `load_records`, of losses (seeds, rates)."""
    seeds, rates = losses.shape
    lrs, numbers = np.meshgrid(2.0 ** np.arange(rates), np.arange(seeds))
    shared: dict[str, Any] = {
        "arm": arm, "setting": "", "label": arm, "optimizer": "adamw", "variant": "", "reference": False, "d_model": 64,
        "status": "completed", "sampler": "grid", "nuisance": "", "added": False, "refines": False, "judged": False,
        "factors": "{}", "initial_loss": 9.0,
    }  # fmt: skip
    return pd.DataFrame({"lr": lrs.ravel(), "seed": numbers.ravel(), "final_loss": losses.ravel()}).assign(**shared)


CURVES = {
    "bent": 0.010 * np.arange(-2.0, 3.0) ** 2,
    "shallow": 0.003 * (np.arange(5) - 1.7) ** 2,
    "steep": 0.030 * (np.arange(5) - 2.4) ** 2,
}
FLAT = np.zeros(5)
SD = 0.010
"""Of a loss between seeds, nats per token; half of its variance is the seed's at all rates."""


def best_losses(draws: Floats) -> Floats:
    """Loss of each seed (..., seeds) at the rate that is best for all, of draws (..., seeds, rates)."""
    best = draws.mean(axis=-2).argmin(axis=-1)
    return np.take_along_axis(draws, best[..., None, None], axis=-1)[..., 0]


def draw(
    curve: str | Floats, seeds: int, studies: int, rng: np.random.Generator, common: Floats | None = None
) -> Floats:
    noise = rng.normal(scale=SD / np.sqrt(2), size=(studies, seeds, 5))
    shared = rng.normal(scale=SD / np.sqrt(2), size=(studies, seeds, 1)) if common is None else common
    return (CURVES[curve] if isinstance(curve, str) else curve) + noise + shared


def test_the_best_loss_of_the_simulation_is_that_of_the_report() -> None:
    draws = draw("shallow", 4, 30, np.random.default_rng(1))
    for study in draws:
        assert sensitivity.points(table_of(study, "a"))["best_loss"].tolist() == best_losses(study).tolist()


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("curve", CURVES)
def test_intervals_cover_what_they_say(curve: str, seeds: int) -> None:
    """95 % intervals of best losses and of their differences, the choice of the best rate included."""
    studies, rng = 8_000, np.random.default_rng(seeds)
    shared = rng.normal(scale=SD / np.sqrt(2), size=(studies, seeds, 1))
    of, against = (best_losses(draw(name, seeds, studies, rng, shared)) for name in (curve, "bent"))
    truth, other = CURVES[curve].min(), CURVES["bent"].min()
    for values, true in ((of, truth), (of - against, truth - other)):
        assert 0.93 <= coverage(values, true) <= 0.97


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_flat_curves_flatter_a_best_loss_and_not_a_difference(seeds: int) -> None:
    """Where all rates are as good, the lowest mean is lucky: on both sides of a comparison."""
    studies, rng = 8_000, np.random.default_rng(seeds)
    shared = rng.normal(scale=SD / np.sqrt(2), size=(studies, seeds, 1))
    of, against = (best_losses(draw(FLAT, seeds, studies, rng, shared)) for _ in range(2))
    assert 0.90 <= coverage(of, 0.0) <= 0.95
    assert coverage(of - against, 0.0) >= 0.95


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("curve", CURVES)
def test_intervals_of_means_over_rates_and_of_sensitivities_cover_what_they_say(curve: str, seeds: int) -> None:
    draws = draw(curve, seeds, 8_000, np.random.default_rng(seeds))
    mean = draws.mean(axis=2)
    sensitivity_of_seed = mean - draws.min(axis=2)  # what a seed's curve has on the average, noise included
    for values in (mean, sensitivity_of_seed):
        assert 0.93 <= coverage(values, float(values.mean())) <= 0.97


def coverage(values: Floats, true: float) -> float:
    """Share of the rows (studies, seeds) whose interval holds the true value: `mean_interval`, all at once."""
    from lit_mult.analysis.seeds import t_quantile

    seeds = values.shape[1]
    reach = t_quantile(0.975, seeds - 1) * values.std(axis=1, ddof=1) / np.sqrt(seeds)
    return float((np.abs(values.mean(axis=1) - true) <= reach).mean())


def test_a_null_study_calls_few_winners() -> None:
    """The same arm under two names, with seeds of their own: three questions, 20 pairs of seeds, 5 rates."""
    rng, winners, studies = np.random.default_rng(0), 0, 40
    for _ in range(studies):
        runs = pd.concat([table_of(draw("shallow", 20, 1, rng)[0], arm) for arm in ("muP", "vectors")])
        measures: list[Any] = ["best_loss", "sensitivity", "mean_loss"]
        found = answers(runs.reset_index(drop=True), [ask("vectors", "muP", measure=measure) for measure in measures])
        winners += int(found["outcome"].isin(["lower", "higher"]).sum())
    assert winners / (3 * studies) <= 0.07
