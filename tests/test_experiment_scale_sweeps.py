"""Experiments on the scale of the LM head and of the MLP matrices: made-up studies of which the truth is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import pytest
from experiment_data import Reading, evidence, outcomes_by_claim, saved

from lit_mult.analysis.evidence import scale_sweep
from lit_mult.analysis.experiments import mlp_scale, projector_norm
from lit_mult.analysis.findings import Findings
from lit_mult.errors import UserError

SCALES = (0.125, 0.5, 2.0, 8.0, 32.0)
MLP_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
SEEDS = (0, 1, 2)
Cell = tuple[dict[str, Any], list[Reading]]


def jitter(seed: int, scale: float) -> float:
    """Between -1 and 1, the same each time."""
    return math.sin(10 * seed + 3 * math.log2(scale))


def head_cells(
    *, rises: Mapping[str, tuple[float, float]], slopes: Mapping[str, float], logits: float = 0.0, rows: float = 1.0
) -> list[Cell]:
    """A study of the LM head.

    Losses rise by `rises` at the smallest and at the largest scale, ‖W‖ = 0.2 S^slope, logits go as S^logits, and the
    row of median norm is `rows` times the level of noise.
    """
    cells = []
    for arm, (low, high) in rises.items():
        for scale in SCALES:
            for seed in SEEDS:
                loss = 3 + (low if scale < 2 else high) * (math.log2(scale / 2) / 4) ** 2 + 1e-3 * jitter(seed, scale)
                readings = [
                    (100, "weight_rms", "lm_head", 0.2 * scale ** slopes[arm]),
                    (100, "weight_rms", "layers.0.mlp.gate_proj", 7.0),
                    (50, "weight_rms", "lm_head", 9.0),
                    (100, "weight_noise_rms", "lm_head", 0.1 * scale),
                    (100, "row_norm_mean", "lm_head", 0.25 * scale),
                    (100, "row_norm_q50", "lm_head", 0.4 * rows * (1 + 0.01 * jitter(seed, scale))),
                    (100, "logits_rms", "lm_head", 5 * scale**logits * (1 + 0.01 * jitter(seed, scale))),
                    (100, "final_norm_output_rms", "norm", 1 / scale),
                ]
                cells.append(({"arm": arm, projector_norm.FACTOR: scale, "seed": seed, "final_loss": loss}, readings))
    return cells


FLAT = {"FPN": (0.5, 0.5), "SPN": (0.005, 0.005), "VPN": (0.005, 0.005)}
AS_PAPER = {"FPN": 0.5, "SPN": 1.0, "VPN": 1.0}


def mlp_cells(*, with_scalars: float, compensated: float, slope: float = 1.0, rise: float = 0.4) -> list[Cell]:
    """At the largest scale the loss rises by `rise` without scalars; their product goes as S^-compensated."""
    cells = []
    for optimizer in ("adamw", "muon"):
        for arm, height in (("none", rise), ("scalars", with_scalars)):
            for scale in MLP_SCALES:
                for seed in SEEDS:
                    loss = 3 + height * max(0.0, math.log2(scale) / 2) + 1e-3 * jitter(seed, scale)
                    power = compensated if arm == "scalars" else 0.0
                    readings: list[Reading] = []
                    for layer, at in ((0, 0.5), (1, 2.0)):  # of geometric mean 1
                        mlp = f"layers.{layer}.mlp"
                        readings.append((100, "mlp_output_rms", mlp, at * scale ** (3 * slope - power)))
                        for role, share in (("gate_proj", 0.5), ("up_proj", 0.25), ("down_proj", 0.25)):
                            readings.append((100, "weight_rms", f"{mlp}.{role}", 0.1 * at * scale**slope))
                            readings.append((100, "weight_noise_rms", f"{mlp}.{role}", 0.1 * at * scale))
                            if arm == "scalars":
                                value = -at * scale ** (-power * share) * (1 + 0.01 * jitter(seed, scale))
                                readings.append((100, "scalar_value", f"{mlp}.{role}", value))
                    readings.append((100, "weight_rms", "lm_head", 9.0))
                    factor = json.dumps(dict.fromkeys(("gate_proj", "up_proj", "down_proj"), scale))
                    columns = {"arm": arm, "optimizer": optimizer, mlp_scale.FACTOR: factor, "seed": seed}
                    cells.append((columns | {"final_loss": loss}, readings))
    return cells


def of(found: Findings, *parts: str) -> str:
    """The outcome of the one claim that has all of these parts."""
    (outcome,) = [value for claim, value in outcomes_by_claim(found).items() if all(part in claim for part in parts)]
    return outcome


def drawn(found: Findings) -> None:
    """Every figure can be laid out: faster than its files, which two tests save."""
    assert found.captions.keys() == found.figures.keys()
    for figure in found.figures.values():
        figure.draw_without_rendering()


def test_scale_is_the_factor_of_the_rate_of_one_role_or_of_several_alike() -> None:
    assert scale_sweep.scale(0.125) == 0.125
    assert scale_sweep.scale('{"gate_proj": 2, "up_proj": 2.0}') == 2.0
    with pytest.raises(UserError, match="must be equal"):
        scale_sweep.scale('{"gate_proj": 2, "up_proj": 1}')


def test_statistics_of_a_curve_by_hand() -> None:
    losses = pd.DataFrame([[3.5, 3.0, 3.2], [3.7, 3.1, 3.1]], index=pd.Index([0, 1], name="seed"), columns=[0.5, 1, 4])
    assert scale_sweep.rise(losses, 0.5).tolist() == pytest.approx([0.5, 0.6])  # both choose 1
    assert scale_sweep.rise(losses, 1).tolist() == pytest.approx([-0.2, 0.0])  # below 0: no other scale is better
    split = pd.DataFrame([[3.5, 3.0, 3.2], [3.7, 3.3, 3.1]], index=losses.index, columns=losses.columns)
    assert scale_sweep.rise(split, 0.5).tolist() == pytest.approx([0.5, 0.4])  # one scale for both
    assert scale_sweep.rise(losses[:1], 0.5).tolist() == pytest.approx([0.5])
    assert scale_sweep.log_slope(3 * losses.mul(0).add([2.0, 8.0, 128.0])).tolist() == pytest.approx([2.0, 2.0])
    ratios = losses.mul(0).add([0.5, 1.0, 4.0])
    assert scale_sweep.typical_factor(ratios).tolist() == pytest.approx([2.0, 2.0])  # (8)^(1/3): nothing cancels
    assert scale_sweep.rise(losses[[1]], 1).empty
    assert scale_sweep.log_slope(losses[[1]]).empty


def test_a_share_of_a_rise_is_judged_as_a_difference_of_equal_seeds() -> None:
    of, whole = pd.Series({0: 9.0, 1: 0.1, 2: 0.12}), pd.Series({1: 0.4, 2: 0.8, 3: 1.0})
    verdict = scale_sweep.judge_share("flat", "difference", of, whole, 0.25)
    assert (verdict.seeds, verdict.value) == (2, pytest.approx(-0.04))
    verdict = scale_sweep.judge_share("flat", "difference", of, -whole, 0.25)
    assert verdict.outcome == "not at this scale"  # 0.2 and 0.32 above 0, but where the other falls nothing is tested


def test_a_head_as_in_the_paper() -> None:
    found = projector_norm.findings(evidence(head_cells(rises=FLAT, slopes=AS_PAPER)))

    assert of(found, "(FPN) the loss rises at the smallest") == "reproduced"
    assert of(found, "(FPN) the loss rises at the largest") == "reproduced"
    for arm in ("SPN", "VPN"):
        assert of(found, f"({arm}) the loss is flat at the smallest") == "reproduced"
        assert of(found, f"({arm}) the loss is flat at the largest") == "reproduced"
        assert of(found, arm, "norm of the logits") == "reproduced"
        assert of(found, arm, "whole head follows its scale") == "reproduced"
        assert of(found, arm, "row of median norm follows its scale") == "reproduced"
        assert of(found, arm, "row of median norm is that of noise") == "reproduced"
        assert of(found, arm, "whole head is that of noise") == "contradicted"  # planted: twice the level of noise
    assert of(found, "FPN the norm of the whole head follows") == "contradicted"  # planted: its square root
    assert of(found, "FPN the norm of the row of median norm follows") == "reproduced"
    assert of(found, "pulls the head of FPN away") == "reproduced"
    assert len(outcomes_by_claim(found)) == 19
    saved(found)


def test_a_head_against_the_paper() -> None:
    rises = {"FPN": (0.5, -0.5), "SPN": (0.3, 0.3), "VPN": (0.3, 0.3)}
    slopes = {"FPN": 1.2, "SPN": 0.7, "VPN": 0.7}
    found = projector_norm.findings(evidence(head_cells(rises=rises, slopes=slopes, logits=0.3, rows=1.3)))

    assert of(found, "(FPN) the loss rises at the largest") == "contradicted"
    assert of(found, "(VPN) the loss is flat at the smallest") == "contradicted"
    assert of(found, "(SPN) the loss is flat at the largest") == "not at this scale"  # FPN does not rise there
    assert of(found, "SPN", "norm of the logits") == "contradicted"
    assert of(found, "SPN", "whole head follows its scale") == "contradicted"
    assert of(found, "SPN", "row of median norm follows its scale") == "reproduced"
    assert of(found, "SPN", "row of median norm is that of noise") == "contradicted"
    assert of(found, "pulls the head of FPN away") == "contradicted"


def test_the_tables_of_the_head_by_hand() -> None:
    found = projector_norm.findings(evidence(head_cells(rises=FLAT, slopes=AS_PAPER)))
    slopes, factors, rises = (found.tables[name] for name in ("slopes", "noise_factors", "rises"))

    heads = slopes[slopes["measure"] == "head_rms"].groupby(["arm", "from_scale"])["slope"].agg(["mean", "size"])
    for (arm, smallest), (slope, seeds) in heads.iterrows():  # type: ignore[misc]
        assert smallest in (0.125, 2.0)
        assert (slope, seeds) == (pytest.approx(AS_PAPER[str(arm)]), 3)
    whole = factors[(factors["measure"] == "head_over_noise") & (factors["arm"] == "SPN")]
    assert whole["factor"].tolist() == pytest.approx([2.0] * 3)
    low = rises[(rises["arm"] == "FPN") & (rises["at"] == 0.125)].set_index("seed")["rise"]
    for seed in SEEDS:
        assert low[seed] == pytest.approx(0.5 + 1e-3 * (jitter(seed, 0.125) - jitter(seed, 2.0)))
    means = found.display_tables["means"].set_index(["arm", "measure"])
    assert means.loc[("SPN", "head rms"), "S = 8"] == "1.6000"
    assert found.warnings == []


def test_which_losses_exceed_their_best_at_the_extremes_is_said() -> None:
    rises = {"FPN": (0.5, 0.5), "SPN": (0.0, 0.0), "VPN": (0.3, 0.0)}
    fpn, spn, vpn = projector_norm.findings(evidence(head_cells(rises=rises, slopes=AS_PAPER))).statements[
        "Loss at the extremes"
    ]
    exceeds, not_exceeds = (f"{verb} its best by more than the interval at" for verb in ("exceeds", "does not exceed"))
    assert fpn.startswith(f"FPN, AdamW: the loss {exceeds} S = 0.125 (0.5 [0.49")
    assert " and S = 32 (" in fpn
    assert spn.startswith(f"SPN, AdamW: the loss {not_exceeds} S = 0.125 (")
    assert vpn.startswith(f"VPN, AdamW: the loss {exceeds} S = 0.125 (0.3")
    assert f"; it {not_exceeds} S = 32 (" in vpn


def test_mlp_matrices_as_in_the_paper() -> None:
    found = mlp_scale.findings(evidence(mlp_cells(with_scalars=0.02, compensated=3)))

    assert set(outcomes_by_claim(found).values()) == {"reproduced"}
    assert len(outcomes_by_claim(found)) == 2 * 9
    slopes = found.tables["slopes"].groupby(["optimizer", "arm", "measure"])["slope"].mean()
    assert slopes["muon", "none", "output_rms"] == pytest.approx(3)
    assert slopes["muon", "scalars", "output_rms"] == pytest.approx(0, abs=1e-9)
    assert slopes["adamw", "scalars", "scalars_product"] == pytest.approx(-3, abs=0.01)
    assert slopes["adamw", "scalars", "gate_scalar"] == pytest.approx(-1.5, abs=0.01)
    assert ("adamw", "none", "gate_scalar") not in slopes
    points = found.tables["points"].query("arm == 'scalars' and scale == 1 and seed == 0")
    assert points["gate_scalar"].tolist() == pytest.approx([1 + 0.01 * jitter(0, 1.0)] * 2)  # |-0.5| and |-2|
    assert points["mlp_rms"].tolist() == pytest.approx([0.1] * 2)
    saved(found)


def test_norms_of_single_matrices_do_not_cancel() -> None:
    cells = mlp_cells(with_scalars=0.02, compensated=3)
    for _, readings in cells:
        for i, (step, quantity, name, value) in enumerate(readings):
            if quantity == "weight_rms" and ".mlp." in name:
                readings[i] = (step, quantity, name, value * (1.5 if name.startswith("layers.0") else 1 / 1.5))
    found = mlp_scale.findings(evidence(cells))

    assert found.tables["points"]["mlp_over_noise"].tolist() == pytest.approx([1.0] * 60)
    assert found.tables["points"]["mlp_noise_factor"].tolist() == pytest.approx([1.5] * 60)
    assert of(found, "without scalars is that of noise", "Muon") == "contradicted"
    assert of(found, "without scalars follows their scale", "Muon") == "reproduced"


def test_a_study_that_varies_something_else_is_refused() -> None:
    cells = head_cells(rises=FLAT, slopes=AS_PAPER)
    for columns, _ in cells:
        columns["optimizer"] = "muon" if columns["seed"] else "adamw"
    with pytest.raises(UserError, match="does not vary optimizer"):
        projector_norm.findings(evidence(cells))
    with pytest.raises(UserError, match="has the arms none, scalars, not FPN"):
        mlp_scale.findings(evidence(cells))


def test_mlp_matrices_against_the_paper() -> None:
    found = mlp_scale.findings(evidence(mlp_cells(with_scalars=0.3, compensated=1.5, slope=0.8)))

    for optimizer in ("AdamW", "Muon"):
        assert of(found, "Without scalars the loss rises", optimizer) == "reproduced"
        assert of(found, "With scalars the loss is flat", optimizer) == "contradicted"
        assert of(found, "With scalars the outputs", optimizer) == "contradicted"
        assert of(found, "compensate", optimizer) == "contradicted"
        assert of(found, "without scalars follows their scale", optimizer) == "contradicted"
        # Planted: over the scales S^-0.2 is as often above 1 as below; 2^(0.2 * 6 / 5) is typical.
        assert of(found, "with scalars is that of noise", optimizer) == "contradicted"
    assert set(found.tables["noise_factors"]["factor"].round(12)) == {round(2**0.24, 12)}

    found = mlp_scale.findings(evidence(mlp_cells(with_scalars=0.0, compensated=3, slope=0, rise=-0.3)))
    assert of(found, "Without scalars the loss rises", "Muon") == "contradicted"
    assert of(found, "With scalars the loss is flat", "Muon") == "not at this scale"
    assert of(found, "Without scalars the outputs", "Muon") == "contradicted"


def test_a_run_that_diverged_leaves_its_claims_undecided_and_is_warned_of() -> None:
    cells = mlp_cells(with_scalars=0.02, compensated=3)
    lost = next(columns for columns, _ in cells if columns["arm"] == "none" and scale_of(columns) == 4)
    lost.update(final_loss=math.nan, status="diverged")
    found = mlp_scale.findings(evidence(cells))

    assert of(found, "Without scalars the loss rises", "AdamW") == "undecided"
    assert of(found, "Without scalars the outputs", "AdamW") == "undecided"
    assert of(found, "With scalars the outputs", "AdamW") == "reproduced"
    assert of(found, "Without scalars the loss rises", "Muon") == "reproduced"
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("1 of 60 runs diverged or were pruned")
    shown = found.display_tables["rises"].set_index(["optimizer", "arm", "at"])
    assert shown.loc[("AdamW", "none", "4"), ["rise", "95 % interval"]].tolist() == ["n/a"] * 2
    assert (
        "may or may not exceed its best by more than the interval at S = 4"
        in found.statements["Loss at the extremes"][0]
    )
    drawn(found)


def scale_of(columns: Mapping[str, Any]) -> float:
    return scale_sweep.scale(columns.get(projector_norm.FACTOR) or columns[mlp_scale.FACTOR])


PARTS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "one seed": lambda run: run["seed"] == 0,
    "one arm, and a scale of another": lambda run: (
        run["arm"] in ("FPN", "none") or (run["arm"] in ("SPN", "scalars") and scale_of(run) == 2)
    ),
    "one scale": lambda run: scale_of(run) == 2,
    "one run": lambda run: (run["seed"], scale_of(run)) == (1, 2) and run["arm"] in ("SPN", "scalars"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_study_under_way_is_reported_and_of_single_seeds_nothing_is_decided(part: str) -> None:
    for cells, findings in (
        (head_cells(rises=FLAT, slopes=AS_PAPER), projector_norm.findings),
        (mlp_cells(with_scalars=0.02, compensated=3), mlp_scale.findings),
    ):
        found = findings(evidence([cell for cell in cells if PARTS[part](cell[0])]))
        assert outcomes_by_claim(found)
        assert not found.tables["verdicts"]["value"].isna().any() or part == "one seed"
        if part in ("one seed", "one run"):
            assert set(outcomes_by_claim(found).values()) == {"undecided"}
        if part in ("one scale", "one run"):
            assert all("is that of noise" in claim for claim in outcomes_by_claim(found))
            assert "Loss at the extremes" not in found.statements
        drawn(found)


def test_all_runs_diverged() -> None:
    for cells, findings in (
        (head_cells(rises=FLAT, slopes=AS_PAPER), projector_norm.findings),
        (mlp_cells(with_scalars=0.02, compensated=3), mlp_scale.findings),
    ):
        for columns, _ in cells:
            columns["final_loss"] = math.nan
        found = findings(evidence(cells))
        assert set(outcomes_by_claim(found).values()) == {"undecided"}
        drawn(found)


def test_a_seed_without_a_run_at_every_scale_is_left_out_and_named() -> None:
    cells = [
        (columns, readings)
        for columns, readings in head_cells(rises=FLAT, slopes=AS_PAPER)
        if (columns["arm"], columns["seed"], columns[projector_norm.FACTOR]) != ("SPN", 2, 8.0)
    ]
    found = projector_norm.findings(evidence(cells))

    assert found.warnings == [
        "not a run at every scale, so left out of rises, slopes and noise factors: SPN, AdamW, seed 2"
    ]
    rises = found.tables["rises"]
    assert rises[rises["arm"] == "SPN"]["seed"].unique().tolist() == [0, 1]
    verdicts = found.tables["verdicts"]
    assert verdicts[verdicts["claim"].str.contains("(SPN) the loss", regex=False)]["seeds"].tolist() == [2, 2]
