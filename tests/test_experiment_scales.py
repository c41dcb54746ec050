"""Experiments on learned scales over depth, rows and width: planted slopes and breadths come back, both ways."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from experiment_data import Reading, evidence, outcomes_by_claim

from lit_mult.analysis import drawing
from lit_mult.analysis.experiments import depth_scales, row_norms, width_scaling
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.seeds import slope
from lit_mult.errors import UserError
from lit_mult.registry.roles import MATRIX_ROLES

Cell = tuple[dict[str, Any], list[Reading]]
WIDTHS = (32, 64, 128, 256)
DIVERGED = {"status": "diverged", "final_loss": math.nan}


def check_figure(found: Findings, name: str) -> None:
    assert list(found.captions) == [name]
    assert drawing.save(found.figures[name])["png"].startswith(b"\x89PNG")


def depth_cell(arm: str, seed: int, growth: float, pattern: float, **columns: Any) -> Cell:
    """Outputs e^(0.2 layer), times e^(growth layer) with scalars; scalars alternate by ±pattern over the layers."""
    readings = []
    for layer in range(6):
        noise = 0.01 * math.sin(7 * layer + 3 * seed)
        size = math.exp(0.2 * layer + seed + (growth * layer + noise if arm == "scalars" else 0))
        block = f"layers.{layer}"
        readings += [(9, "attention_output_rms", f"{block}.self_attn", size)]
        readings += [(9, "mlp_output_rms", f"{block}.mlp", size), (4, "mlp_output_rms", f"{block}.mlp", 77.0)]
        if arm == "scalars":
            for place, role in (("self_attn", "o_proj"), ("mlp", "down_proj"), ("self_attn", "q_proj")):
                value = math.exp(pattern * (-1) ** layer + noise)
                readings.append((9, "scalar_value", f"{block}.{place}.{role}", -value if role == "q_proj" else value))
    return {"arm": arm, "seed": seed, **columns}, [*readings, (9, "scalar_value", "lm_head", 5.0)]


def depth_cells(growth: float, pattern: float, seeds: int = 3) -> list[Cell]:
    return [depth_cell(arm, seed, growth, pattern) for arm in ("none", "scalars") for seed in range(seeds)]


def test_outputs_that_grow_with_depth_and_patterned_scalars_are_found() -> None:
    found = depth_scales.findings(evidence(depth_cells(growth=0.1, pattern=0.5)))
    assert outcomes_by_claim(found) == {
        "Block outputs grow with depth relative to the baseline, as in fig. 2 (attention output, AdamW)": "reproduced",
        "Block outputs grow with depth relative to the baseline, as in fig. 2 (MLP output, AdamW)": "reproduced",
        "Scalars out of a block have a pattern over depth, as in fig. 2 (AdamW)": "reproduced",
        "Scalars inside a block have a pattern over depth, as in fig. 2 (AdamW)": "reproduced",
    }
    slope = found.tables["slopes"].set_index("what")
    assert slope.at["MLP output, scalars / none", "slope"] == pytest.approx(0.1, abs=0.005)
    means = found.tables["means"].set_index(["arm", "what", "layer"])["value"]
    assert means["none", "MLP output", 2] == pytest.approx(
        math.exp(0.4 + 1)
    )  # seeds 0, 1, 2: e^1 on the geometric mean
    assert means["scalars", "q_proj", 1] == pytest.approx(math.exp(-0.5), rel=0.02)
    check_figure(found, "depth_scales")


def test_dead_sublayers_make_no_growth_with_depth() -> None:
    cells = depth_cells(growth=-0.1, pattern=0.5)
    for run, readings in cells[3:]:
        for number, (step, quantity, name, value) in enumerate(readings):
            if "layers.0.mlp" in name:
                shrunk = 1e-6 if quantity == "mlp_output_rms" else 1e-5
                readings[number] = (step, quantity, name, value * shrunk)
            elif quantity == "mlp_output_rms" and "layers.1." in name and run["seed"] == 2:
                readings[number] = (step, quantity, name, value * 0.009 * math.exp(0.1 - 0.01 * math.sin(13)))
    found = depth_scales.findings(evidence(cells))
    # With the dead MLP of layer 0 at ln(1e-6) the slope would be +1.87, which is no growth from layer 1 on.
    assert list(outcomes_by_claim(found).values()) == ["contradicted"] * 2 + ["reproduced"] * 2
    slope = found.tables["slopes"].set_index("what")["slope"]
    assert slope["MLP output, scalars / none"] == pytest.approx(-0.1, abs=0.01)
    assert abs(slope["down_proj"]) < 0.1
    dead = found.tables["dead"]
    assert dead[["what", "layer", "seed"]].to_numpy().tolist() == [
        ["MLP output", 0, 0], ["MLP output", 0, 1], ["MLP output", 0, 2], ["MLP output", 1, 2],
    ]  # fmt: skip
    assert dead["ratio"].iloc[-1] == pytest.approx(0.009)
    assert found.statements["Dead sublayers"] == [
        "attention output, AdamW: 0 of 18 (layer, seed) pairs have below 0.01 of the baseline.",
        "MLP output, AdamW: 4 of 18 (layer, seed) pairs have below 0.01 of the baseline: layer 0 (seed 0, 1, 2), "
        "layer 1 (seed 2).",
    ]


def test_growth_is_not_tested_where_most_sublayers_of_a_seed_are_dead() -> None:
    for dead, outcome in ((3, "reproduced"), (4, "not at this scale"), (6, "not at this scale")):
        cells = depth_cells(growth=0.1, pattern=0.5)
        readings = cells[-1][1]
        for number, (step, quantity, name, value) in enumerate(readings):
            if quantity == "mlp_output_rms" and int(name.split(".")[1]) < dead:
                readings[number] = (step, quantity, name, value * 1e-5)
        found = depth_scales.findings(evidence(cells))
        growth = outcomes_by_claim(found)
        assert [growth[claim] for claim in growth if "MLP output" in claim] == [outcome]
        assert [growth[claim] for claim in growth if "attention output" in claim] == ["reproduced"]


def test_outputs_that_shrink_with_depth_contradict_and_scalars_without_a_pattern_show_none() -> None:
    found = depth_scales.findings(evidence(depth_cells(growth=-0.1, pattern=0.0)))
    growing, patterned = list(outcomes_by_claim(found).values())[:2], list(outcomes_by_claim(found).values())[2:]
    assert growing == ["contradicted"] * 2
    assert "reproduced" not in patterned


def test_depth_with_an_optimizer_a_seed_or_an_arm_missing() -> None:
    cells = depth_cells(growth=0.1, pattern=0.5)[:-1]  # seed 2 has no scalars yet
    cells += [depth_cell("none", 0, 0, 0, optimizer="muon")]
    found = depth_scales.findings(evidence(cells))
    assert set(outcomes_by_claim(found).values()) == {"reproduced"}
    assert set(found.tables["verdicts"]["seeds"]) == {2}
    baseline_alone = depth_scales.findings(evidence(cells[:1]))
    assert baseline_alone.tables["verdicts"].empty
    check_figure(baseline_alone, "depth_scales")


def test_a_diverged_run_leaves_its_claims_undecided_with_a_warning() -> None:
    cells = depth_cells(growth=0.1, pattern=0.5)
    cells[-1][0].update(DIVERGED)
    found = depth_scales.findings(evidence(cells))
    assert set(outcomes_by_claim(found).values()) == {"undecided"}
    assert found.warnings == [
        "1 of 6 runs diverged or were pruned, which leaves claims that need them undecided: cell5 (diverged)"
    ]


def row_cell(arm: str, seed: int, log_std: float, **columns: Any) -> Cell:
    quantiles = {"q0": -3, "q5": -1.6, "q25": -0.7, "q50": 0, "q75": 0.7, "q95": 1.6, "q100": 3}
    names = [f"layers.{layer}.{role}" for layer in range(2) for role in ("q_proj", "k_proj", "v_proj", "gate_proj")]
    readings: list[Reading] = []
    for number, name in enumerate([*names, "lm_head"]):
        breadth = log_std * (1.5 if number % 2 else 1 / 1.5) * (1 + 0.01 * seed * (arm == "vectors"))
        readings.append((9, "row_norm_log_std", name, 7 * breadth if arm == "vectors" else breadth))  # dead rows
        readings += [(9, f"row_norm_{q}", name, math.exp(breadth * x)) for q, x in quantiles.items()]
    return {"arm": arm, "seed": seed, **columns}, readings


def row_cells(vectors: float) -> list[Cell]:
    breadths = {"none": 0.1, "vectors": vectors}
    return [row_cell(arm, seed, breadth) for arm, breadth in breadths.items() for seed in range(3)]


@pytest.mark.parametrize(
    ("vectors", "broader", "much"),
    [
        (0.3, "reproduced", "reproduced"),
        (0.15, "reproduced", "contradicted"),
        (0.08, "contradicted", "contradicted"),
        (0.099, "undecided", "contradicted"),  # seeds at 0.99, 1.0 and 1.01 times the breadth without
    ],
)
def test_the_breadth_of_row_norms_is_judged_against_that_without_vectors(
    vectors: float, broader: str, much: str
) -> None:
    found = row_norms.findings(evidence(row_cells(vectors)))
    assert list(outcomes_by_claim(found).values()) == [broader, much] * 2
    breadth = found.tables["breadth"].set_index("role")
    assert breadth.loc["gate_proj", "ratio"] == pytest.approx(1.01 * vectors / 0.1)
    assert breadth.loc["gate_proj", "none"] == pytest.approx(0.15 * 1.4 / 1.349)  # ln(q75 / q25) is 1.4 breadths
    by_std = found.tables["breadth_by_standard_deviation"].set_index("role")
    assert by_std.loc["gate_proj", "ratio"] == pytest.approx(7 * 1.01 * vectors / 0.1)
    assert by_std.loc["gate_proj", "none"] == pytest.approx(0.15)
    statistic = found.tables["verdicts"]["statistic"].iloc[0]
    assert f"by its standard deviation: {7 * 1.01 * vectors / 0.1:.3g} [" in statistic
    shown = found.display_tables["breadth"].set_index("role").loc["gate_proj"]
    assert (shown["optimizer"], shown["none"], shown["seeds"]) == ("AdamW", "0.1557", "3")
    assert set(breadth.index) == {"q_proj", "k_proj", "v_proj", "gate_proj", "lm_head"}
    check_figure(found, "row_norms")


def test_row_norms_of_one_arm_or_with_a_diverged_run() -> None:
    alone = row_norms.findings(evidence(row_cells(0.3)[:3]))
    assert alone.tables["verdicts"].empty
    assert alone.display_tables["breadth"].empty
    check_figure(alone, "row_norms")
    cells = row_cells(0.3)
    cells[4][0].update(DIVERGED)
    found = row_norms.findings(evidence(cells))
    assert set(outcomes_by_claim(found).values()) == {"undecided"}
    assert len(found.warnings) == 1
    check_figure(found, "row_norms")


def test_dead_rows_are_read_off_the_quantiles() -> None:
    cells = row_cells(0.3)
    for _, readings in cells[3:]:
        for number, (step, quantity, name, _) in enumerate(readings):
            if "layers.0.q_proj" in name and quantity in ("row_norm_q0", "row_norm_q5", "row_norm_q25"):
                small = {"row_norm_q0": 1e-4, "row_norm_q5": 1e-3, "row_norm_q25": 1e-1}[quantity]
                readings[number] = (step, quantity, name, small)
            elif "gate_proj" in name and quantity in ("row_norm_q0", "row_norm_q5", "row_norm_q25"):
                readings[number] = (step, quantity, name, 1e-3)
    found = row_norms.findings(evidence(cells))
    dead = found.tables["dead_rows"].groupby(["arm", "name"])["dead"].mean()
    assert dead["vectors", "layers.0.q_proj"] == pytest.approx(0.15)  # 0.01 is half way from 0.001 (5 %) to 0.1 (25 %)
    assert dead["none"].eq(0).all()
    # Of the six matrices one has 15 %; of the gate, all have 25 % and more, up to the median of 1: 0.25 + 0.25 / 3.
    assert found.statements["Dead rows"] == [
        "attention-in, AdamW: dead are about 0.0% of the rows of none (more than a quarter in 0 of 18 matrices); "
        "2.5% of the rows of vectors (more than a quarter in 0 of 18 matrices).",
        "MLP gate, AdamW: dead are about 0.0% of the rows of none (more than a quarter in 0 of 6 matrices); "
        "33.3% of the rows of vectors (more than a quarter in 6 of 6 matrices).",
    ]


def test_the_density_of_row_norms_is_what_the_quantiles_say() -> None:
    levels = {name: math.exp(level) for name, level in row_norms.LEVELS.items()}  # uniform in ln(norm) on [0, 1]
    quantiles = pd.DataFrame(
        [{"cell": "a", "name": "m", "quantity": name, "value": value} for name, value in levels.items()]
    )
    assert row_norms.density(quantiles, np.array([-1.0, 0.0, 0.5, 1.0, 3.0])).tolist() == pytest.approx([0, 1, 1, 0])


def width_cells(
    seeds: int = 3, head: float = -0.9, query: float = -0.8, matrices: float = 0.02, logits: float = 0.05
) -> Iterator[Cell]:
    """Scales that are powers of the width; the key's scalar has the power of the query's, others none.

    Half way, the head's scalar has half of its power.
    """
    for seed, width in product(range(seeds), WIDTHS):
        wiggle = 1 + 0.01 * seed * (width / 256)
        powers = {"lm_head": head, "q_proj": query, "k_proj": query}
        readings: list[Reading] = []
        for role in sorted(MATRIX_ROLES):
            for layer in range(2):
                name = role.value if role in ("lm_head", "embedding") else f"layers.{layer}.{role}"
                if layer == 0 or name.startswith("layers"):
                    readings.append((9, "scalar_value", name, 3 * wiggle * width ** powers.get(role.value, 0.0)))
                    readings.append((9, "weight_rms", name, wiggle * width**matrices))
        readings += [(9, "attention_logits_rms", f"layers.{n}.self_attn", wiggle * width**logits) for n in range(2)]
        readings += [(9, "logits_rms", "lm_head", wiggle * width**logits)]
        readings += [(5, "scalar_value", "lm_head", 3 * width ** (head / 2)), (0, "scalar_value", "lm_head", 1.0)]
        yield {"arm": "scalars", "seed": seed, "d_model": width}, readings


def test_powers_of_the_width_are_found() -> None:
    found = width_scaling.findings(evidence(width_cells()))
    assert list(outcomes_by_claim(found).values()) == ["reproduced"] * 6
    exponents = found.tables["exponents"].set_index("what")
    for what, exponent in {"scalar of the head": -0.9, "query · key": -1.6, "up · down": 0.0, "logits": 0.05}.items():
        assert exponents.at[what, "slope"] == pytest.approx(exponent, abs=0.02)
        assert exponents.at[what, "slope_larger_widths"] == pytest.approx(exponent, abs=0.02)
    assert exponents.at["scalar of the head", "slope_halfway"] == pytest.approx(-0.45)
    shown = found.display_tables["exponents"].set_index("scale").loc["scalar of the head"]
    assert (shown["judged"], shown["half way"]) == ("-1 to -0.5", "-0.45 [-0.45, -0.45]")
    assert "at the end, from width 64" in shown
    means = found.tables["means"].set_index(["what", "d_model"])["value"]
    assert means["query · key", 32] == pytest.approx(9 * 32**-1.6, rel=0.01)
    assert means["up · down", 32] == pytest.approx(9, rel=0.01)
    assert means["gate", 32] == pytest.approx(3, rel=0.01)
    check_figure(found, "width_scaling")


def test_other_powers_of_the_width_contradict_the_claims() -> None:
    found = width_scaling.findings(evidence(width_cells(head=-0.2, query=-1.4, matrices=-0.5, logits=0.5)))
    assert list(outcomes_by_claim(found).values()) == ["contradicted"] * 6


def test_widths_and_seeds_that_are_missing() -> None:
    cells = list(width_cells())
    found = width_scaling.findings(evidence(cells[:-1]))
    assert found.warnings == ["seeds without the widths of the others, left out: 2"]
    assert set(found.tables["verdicts"]["seeds"]) == {2}
    one_width = width_scaling.findings(evidence([cells[0], cells[len(WIDTHS)]]))  # of two seeds
    assert one_width.tables["verdicts"].empty
    check_figure(one_width, "width_scaling")
    cells[0][0].update(DIVERGED)
    diverged = width_scaling.findings(evidence(cells))
    assert set(outcomes_by_claim(diverged).values()) == {"undecided"}
    assert len(diverged.warnings) == 1


def test_seeds_of_as_many_but_other_widths_are_not_averaged() -> None:
    cells = [
        cell for cell in width_cells() if (cell[0]["seed"], cell[0]["d_model"]) not in {(0, 32), (1, 32), (2, 256)}
    ]
    found = width_scaling.findings(evidence(cells))
    assert found.warnings == ["seeds without the widths of the others, left out: 2"]
    assert set(found.tables["means"]["d_model"]) == {64, 128, 256}


def test_a_placement_without_a_scalar_on_the_key_counts_the_query_once() -> None:
    cells = [(run, [reading for reading in readings if "k_proj" not in reading[2]]) for run, readings in width_cells()]
    exponents = width_scaling.findings(evidence(cells)).tables["exponents"].set_index("what")["slope"]
    assert exponents["query · key"] == pytest.approx(-0.8, abs=0.02)


@pytest.mark.parametrize("experiment", [depth_scales, row_norms, width_scaling])
def test_a_study_of_other_arms_or_factors_is_refused(experiment: ModuleType) -> None:
    with pytest.raises(UserError, match="has the arms"):
        experiment.findings(evidence([({"arm": "muP"}, [])]))
    arm = "scalars" if experiment is not row_norms else "vectors"
    varied = [({"arm": arm, "optim.weight_decay": decay}, []) for decay in (0.1, 0.4)]
    with pytest.raises(UserError, match=r"does not vary optim\.weight_decay"):
        experiment.findings(evidence(varied))


def test_slopes_are_those_of_least_squares() -> None:
    assert slope([0, 1, 5], [1, 3, 2]) == pytest.approx(np.polyfit([0, 1, 5], [1, 3, 2], 1)[0])
    assert math.isnan(slope([0, 1], [1, math.nan]))
