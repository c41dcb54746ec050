"""brownian_overlay and signal_to_noise: verdicts, tables and figures of made-up runs whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from experiment_data import Reading, evidence, outcomes, saved
from test_analysis_frame import write_run

from lit_mult.analysis.evidence.parameters import entries
from lit_mult.analysis.experiments import brownian_overlay, signal_to_noise
from lit_mult.analysis.findings import Findings
from lit_mult.diagnostics.noise_band import noise_band
from lit_mult.errors import UserError
from lit_mult.schema import RunRecord

Cell = tuple[dict[str, Any], list[Reading]]
HIDDEN = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
SEEDS = (0, 1, 2)
DECAYS = {"strong": 0.4, "weak": 0.1, "vectors": 0.4}
SIZES = {"total": 3000 + 2 * 512 * 64, "non_embedding": 3000, "multipliers": 10}  # 512 tokens at width 64

Study = Callable[[ModuleType, list[Cell]], Findings]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Findings of an experiment from made-up cells, with a record for each arm."""
    record = {
        arm: write_run(tmp_path, 3.0, arm="vectors", cell=arm, factors={"optim.weight_decay": decay}, parameters=SIZES)
        for arm, decay in DECAYS.items()
    }

    def findings(experiment: ModuleType, cells: list[Cell]) -> Findings:
        found = [({"path": record.get(columns["arm"]), **columns}, readings) for columns, readings in cells]
        return experiment.findings(evidence(found))  # type: ignore[no-any-return]

    return findings


def overlay_cell(matrices: float, multipliers: float, off: float = 1.02, **columns: Any) -> Cell:
    """Norms and motions over noise: the two layers' matrices lie by `off` above and below the given factor."""
    columns = {"arm": "strong", "seed": 0, **columns}
    planted = [("weight", "embedding", 1.5), ("weight", "lm_head", 2.0), ("norm", "norm", 4.0)]
    for layer, factor in enumerate((matrices * off, matrices / off)):
        planted += [("weight", f"layers.{layer}.{name}", factor) for name in HIDDEN]
        planted += [("row", f"layers.{layer}.self_attn.q_proj", multipliers)]
    wobble = 1 + 0.001 * columns["seed"]
    readings: list[Reading] = []
    for part, name, factor in planted:
        noise = 0.1 if part == "weight" else 1.0
        for step in (0, 100, 200):
            readings += [(step, f"{part}_rms", name, noise * (factor * wobble if step else 1))]
            readings += [(step, f"{part}_noise_rms", name, noise)]
        readings += [(200, f"{part}_moved", name, 0.3 * factor * wobble), (200, f"{part}_noise_moved", name, 0.3)]
    return columns, readings


def test_matrices_at_noise_and_free_multipliers_are_the_papers_picture(study: Study) -> None:
    cells = [overlay_cell(1.0, 3.0, seed=seed) for seed in SEEDS]
    cells += [overlay_cell(1.2, 0.3, arm="weak", seed=seed) for seed in SEEDS]
    found = study(brownian_overlay, cells)
    assert outcomes(found) == ["reproduced"] * 5  # strong and weak: matrices, multipliers; weak - strong
    strong, weak, free = 1.02, 1.2012, 1 / 0.3003  # a factor of 0.3 is as far from noise as 1 / 0.3
    expected = [strong, math.log(3.003 / strong), weak, math.log(free / weak), math.log(weak / strong)]
    assert found.tables["verdicts"]["value"].tolist() == pytest.approx(expected, rel=1e-3)
    assert not found.warnings
    saved(found)


def test_matrices_off_noise_and_multipliers_at_it_contradict_the_paper(study: Study) -> None:
    cells = [overlay_cell(1.5, 1.0, seed=seed) for seed in SEEDS]
    cells += [overlay_cell(1.4, 1.0, arm="weak", seed=seed) for seed in SEEDS]
    assert outcomes(study(brownian_overlay, cells)) == ["contradicted"] * 5


def test_matrices_above_and_below_noise_do_not_make_up_for_each_other(study: Study) -> None:
    found = study(brownian_overlay, [overlay_cell(1.0, 3.0, off=1.5, seed=seed) for seed in SEEDS])
    assert outcomes(found)[0] == "contradicted"
    assert found.tables["verdicts"]["value"][0] == pytest.approx(1.5)
    (said,) = found.statements["Hidden matrices unlike noise (norm over noise)"]
    assert said.startswith("Outside 10 % of noise at the end (strong decay, AdamW): 6 of 6 hidden matrices, ")
    assert "layers.0.mlp.down_proj 1.50" in said
    assert "layers.1.mlp.down_proj 0.67" in said


def test_multipliers_as_far_from_noise_as_chance_takes_them_resemble_it(study: Study) -> None:
    found = study(brownian_overlay, [overlay_cell(1.0, 1.07, seed=seed) for seed in SEEDS])
    assert outcomes(found) == ["reproduced", "contradicted"]
    (said,) = found.statements["Hidden matrices unlike noise (norm over noise)"]
    assert said == "Outside 10 % of noise at the end (strong decay, AdamW): 0 of 6 hidden matrices."


@pytest.mark.parametrize("other", [{"arm": "stronger"}, {"model.n_layers": 4}])
def test_overlay_refuses_a_study_of_something_else(other: dict[str, Any], study: Study) -> None:
    cells = [overlay_cell(1.0, 3.0, **{"model.n_layers": 2}), overlay_cell(1.0, 3.0, **{"model.n_layers": 2} | other)]
    with pytest.raises(UserError, match="the experiment that the study names"):
        study(brownian_overlay, cells)


def test_ratios_by_role_are_geometric_means_over_layers(study: Study) -> None:
    found = study(brownian_overlay, [overlay_cell(1.3, 3.0), overlay_cell(1.3, 3.0, optimizer="muon")])
    shown = found.display_tables["norm_over_noise"]
    assert list(shown["parameters"]) == [
        *("embedding", "q_proj", "o_proj", "down_proj", "lm_head"),
        *("row multipliers", "RMSNorm weights"),
    ]
    assert list(shown["strong, AdamW"]) == list(shown["strong, Muon"]) == ["1.5", *3 * ["1.3"], "2", "3", "4"]


def test_one_seed_and_diverged_runs_leave_claims_undecided(study: Study) -> None:
    one = study(brownian_overlay, [overlay_cell(1.0, 3.0)])
    assert outcomes(one) == ["undecided"] * 2
    saved(one)
    cells = [overlay_cell(1.0, 3.0, seed=seed) for seed in SEEDS]
    cells[1][0].update(status="diverged", final_loss=math.nan)
    found = study(brownian_overlay, cells)
    assert outcomes(found) == ["undecided"] * 2
    assert found.tables["verdicts"]["seeds"].tolist() == [3, 3]
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("1 of 3 runs diverged or were pruned")
    assert set(found.tables["parameters"]["seed"]) == {0, 2}
    saved(found)


def test_without_a_completed_run_there_are_trajectories_alone(study: Study) -> None:
    found = study(brownian_overlay, [overlay_cell(1.0, 3.0, final_loss=math.nan)])
    assert outcomes(found) == ["undecided"] * 2
    saved(found)


def test_a_diverged_run_leaves_the_contrast_of_decays_undecided(study: Study) -> None:
    cells = [
        overlay_cell(matrices, 3.0, arm=arm, seed=seed)
        for arm, matrices in (("strong", 1.0), ("weak", 1.2))
        for seed in SEEDS
    ]
    cells[0][0].update(status="diverged", final_loss=math.nan)
    assert outcomes(study(brownian_overlay, cells)) == [*2 * ["undecided"], *2 * ["reproduced"], "undecided"]


def snr_cell(batch: int, seed: int, lead: float, ratio: Callable[[float], float], **columns: Any) -> Cell:
    """SNRs that grow with layer, batch and seed; multipliers have `lead` times those of their matrices."""
    readings: list[Reading] = []
    for layer in range(4):
        for part, factor in (("weight", 1.0), ("row", lead)):
            name = f"layers.{layer}.self_attn.q_proj"
            snr = 0.004 * 2**layer * factor * batch / 8 * (1 + 0.05 * seed)
            for step in range(0, 100, 10):
                signal = snr / batch if step >= 45 else 1e3  # the first half of the readings says nothing
                readings += [(step, f"{part}_signal", name, signal), (step, f"{part}_noise", name, 1.0)]
                readings += [(step, f"{part}_snr", name, math.nan)]
            readings += [(100, f"{part}_moved", name, 0.2 * ratio(snr)), (100, f"{part}_noise_moved", name, 0.2)]
    return {"arm": "vectors", "seed": seed, "train.batch_size": batch, **columns}, readings


def snr_cells(lead: float, ratio: Callable[[float], float], batches: Iterable[int] = (2, 8, 32)) -> list[Cell]:
    return [snr_cell(batch, seed, lead, ratio) for batch in batches for seed in SEEDS]


def test_more_signal_frees_parameters(study: Study) -> None:
    found = study(signal_to_noise, snr_cells(10.0, lambda snr: math.sqrt(1 + 20 * snr)))
    assert outcomes(found) == ["reproduced"] * 4
    assert found.tables["verdicts"]["value"][:3].tolist() == pytest.approx([1.0, 1.0, 10.0])
    assert found.display_tables["kinds"]["parameters"].tolist() == 3 * ["query, key"] + 3 * ["row multipliers"]
    kinds = found.tables["kinds"]
    snr = kinds[(kinds["kind"] == "query, key") & (kinds["batch"] == 8) & (kinds["measure"] == "snr")]
    assert snr["value"].item() == pytest.approx(0.004 * (1 + 2 + 4 + 8) / 4 * 1.05)
    matrices = found.tables["cuts"].query("side == 'matrices'")
    assert (matrices["wrong"] == 0).all()
    edge = (noise_band(64 * 64)[1] ** 2 - 1) / 20  # where sqrt(1 + 20 snr) leaves the band
    assert matrices["snr"].between(edge / 1.5, edge * 1.5).all()
    assert found.tables["parameters"].groupby("part")["high"].max().to_dict() == pytest.approx(
        {"weight": 1.124, "row": 1.290}, abs=1e-3
    )
    assert not found.warnings
    saved(found)


def test_signal_that_binds_parameters_and_noisy_multipliers_contradict_the_explanation(study: Study) -> None:
    found = study(signal_to_noise, snr_cells(0.1, lambda snr: 1 + 0.003 / snr))
    assert outcomes(found) == ["contradicted"] * 4


def test_rank_correlation_counts_below_noise_as_far_from_it(study: Study) -> None:
    found = study(signal_to_noise, snr_cells(10.0, lambda snr: 1 / math.sqrt(1 + 20 * snr)))
    assert found.tables["verdicts"]["value"][0] == pytest.approx(1.0)


def test_an_estimate_below_0_is_kept_and_drawn_at_the_floor(study: Study) -> None:
    cells = snr_cells(10.0, lambda snr: math.sqrt(1 + 20 * snr))
    columns, readings = cells[0]
    cells[0] = columns, [(step, what, name, -v if "signal" in what else v) for step, what, name, v in readings]
    found = study(signal_to_noise, cells)
    assert (found.tables["parameters"]["snr"] < 0).sum() == 8
    assert found.warnings == ["8 of 72 signals lie less than two standard errors above 0"]
    saved(found)


def test_partial_and_diverged_studies(study: Study) -> None:
    def ratio(snr: float) -> float:
        return math.sqrt(1 + 20 * snr)

    one_size = study(signal_to_noise, snr_cells(10.0, ratio, batches=(8,)))
    assert outcomes(one_size) == ["reproduced"] * 3  # no larger batch to compare with
    saved(one_size)
    unfinished = study(signal_to_noise, snr_cells(10.0, ratio)[:5])  # of batch 8 a seed is missing
    assert unfinished.tables["verdicts"]["seeds"].tolist() == [2] * 4
    cells = snr_cells(10.0, ratio)
    cells[3][0]["final_loss"] = math.nan
    diverged = study(signal_to_noise, cells)
    assert outcomes(diverged) == ["undecided"] * 4
    assert diverged.warnings[0].startswith("1 of 9 runs diverged or were pruned")
    saved(diverged)
    nothing = study(signal_to_noise, [snr_cell(8, 0, 10.0, ratio, final_loss=math.nan)])
    assert not nothing.figures
    assert outcomes(nothing) == ["undecided"] * 3


@pytest.mark.parametrize(
    ("snr", "free", "expected"),
    [
        ([0.01, 0.02, 0.04, 0.08], [0, 0, 1, 1], (math.sqrt(0.02 * 0.04), 0.0, 0.5)),
        ([0.08, 0.01, 0.04, 0.02], [1, 0, 0, 1], (math.sqrt(0.02 * 0.04), 0.25, 0.5)),  # two cuts alike: between them
        ([0.01, 0.02, 0.04, 0.08], [1, 1, 1, 1], (math.nan, 0.0, 0.0)),
        ([0.01, 0.02, 0.04, 0.08], [1, 1, 0, 0], (math.nan, 0.5, 0.5)),  # more signal, less free
        (
            [0.01, 0.02, 0.02, 0.08],
            [0, 0, 1, 1],
            ((0.01 * 0.02 * 0.02 * 0.08) ** 0.25, 0.25, 0.5),
        ),  # not between equals
        ([-0.5, 1e-5, 0.1, 0.4], [0, 0, 1, 1], (math.sqrt(1e-3 * 0.1), 0.0, 0.5)),  # below the floor
    ],
)
def test_best_cut(snr: list[float], free: list[int], expected: tuple[float, float, float]) -> None:
    points = pd.DataFrame({"snr": snr, "free": np.array(free, dtype=bool)})
    found = signal_to_noise.best_cut(points)
    assert found == pytest.approx(expected, nan_ok=True)


def test_a_vector_is_free_farther_from_noise_than_a_matrix(study: Study) -> None:
    found = study(signal_to_noise, snr_cells(10.0, lambda snr: 1.2))
    assert found.tables["parameters"].groupby("part")["free"].mean().to_dict() == {"row": 0.0, "weight": 1.0}


def test_signal_to_noise_refuses_a_study_of_something_else(study: Study) -> None:
    with pytest.raises(UserError, match="does not vary optimizer"):
        study(signal_to_noise, [snr_cell(8, 0, 10.0, math.exp), snr_cell(8, 0, 10.0, math.exp, optimizer="muon")])


@pytest.mark.parametrize(
    ("name", "role", "part", "expected"),
    [
        ("layers.0.self_attn.k_proj", "k_proj", "weight", 64 * 64),
        ("layers.0.mlp.down_proj", "down_proj", "row", 64),
        ("layers.0.mlp.down_proj", "down_proj", "column", 176),
        ("embed_tokens", "embedding", "row", 512),
        ("lm_head", "lm_head", "scalar", 1),
        ("layers.0.input_layernorm", "norm", "norm", 64),
        ("norm", "norm", "norm", 1),
    ],
)
def test_entries(tmp_path: Path, name: str, role: str, part: str, expected: int) -> None:
    path = write_run(tmp_path, 3.0, arm="vectors", factors={"model.final_norm": "scalar"}, parameters=SIZES)
    assert entries(RunRecord.read(path), name, role, part) == expected


def test_band_of_noise_is_wider_for_few_entries() -> None:
    rng = np.random.default_rng(1)
    for count in (16, 4096):
        low, high = noise_band(count, tolerance=0.0)
        norms = np.sqrt(np.mean(rng.normal(size=(4000, count)) ** 2, axis=1))
        assert np.mean((low < norms) & (norms < high)) == pytest.approx(0.95, abs=0.015)
    assert noise_band(16)[1] == pytest.approx(1.1 * noise_band(16, 0.0)[1])
