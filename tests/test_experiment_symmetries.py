"""Drift along symmetries: a planted drift is found, its absence too, and rounding is told from it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from experiment_data import Reading, evidence, outcomes, saved

from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.experiments import symmetries
from lit_mult.errors import UserError

ROUNDING = {"32-true": 1e-6, "bf16-mixed": 1e-3}


def readings(drift: float, growth: float, rounding: float, last: int = 200) -> Iterator[Reading]:
    """Log ratios of ± drift in two blocks, reached evenly over 200 steps, and a residual of exp(growth) at the end."""
    for step in range(0, last + 1, 100):
        for layer, sign in enumerate((1, -1)):
            yield step, "log_query/key", f"layers.{layer}.self_attn", sign * drift * step / 200
            yield step, "log_value/out", f"layers.{layer}.self_attn", rounding * (step > 0)
            yield step, "log_up/down", f"layers.{layer}.mlp", sign * rounding * (step > 0)
            yield step, "residual_rms", f"layers.{layer}", float(np.exp(growth * step / 200 - 5 * (layer == 0)))
        yield step, "residual_rms", "embed_tokens", 1e9


def study(
    drift: float = 0.6, growth: float = 1.0, held: float = 0.02, rounding: dict[str, float] = ROUNDING
) -> Evidence:
    cells = [
        (
            {"arm": arm, "trainer.precision": precision, "seed": seed},
            list(readings(*(wander if arm == "no-decay" else (held, 0.1)), rounding[precision] * (1 + seed / 10))),
        )
        for precision in ROUNDING
        for arm in ("no-decay", "decay")
        for seed in range(3)
        for wander in [(drift + seed / 100, growth + seed / 100)]
    ]
    return with_group(evidence(cells))


def with_group(made: Evidence) -> Evidence:
    made.readings["group"] = "symmetry"
    return made


def test_planted_drift_is_found() -> None:
    found = symmetries.findings(study())
    assert outcomes(found) == ["reproduced"] * 12
    first, goes_on, small, grows, larger = found.tables["verdicts"]["value"][:5]
    assert first == pytest.approx(0.61 - 0.02)
    assert goes_on == pytest.approx(0.61 / 2)
    assert small == pytest.approx(0.02)
    assert grows == pytest.approx(1.01)
    assert larger == pytest.approx(1.01 - 0.1)
    assert found.tables["verdicts"]["value"].iloc[-1] == pytest.approx(np.log(1e3))  # bf16 over fp32
    shown = found.display_tables["size_at_the_end"]
    row = shown[(shown["quantity"] == "log_query/key") & (shown["arm"] == "decay")].iloc[0]
    assert (row["seeds"], row["end"]) == ("3", "2.0e-2")
    assert found.statements["Divergence"][0] == "32-true, decay: 0 of 3 runs diverged"
    assert list(found.figures) == ["drift"]
    saved(found)


def test_the_opposite_contradicts() -> None:
    found = symmetries.findings(study(drift=-0.01, growth=-1, held=0.5, rounding={"32-true": 1e-3, "bf16-mixed": 1e-6}))
    drifts, goes_on, small, grows, larger = outcomes(found)[:5]
    assert (drifts, small, grows, larger) == ("contradicted",) * 4
    assert goes_on == "undecided"  # sizes of 0.01, 0, 0.01: within the noise
    assert outcomes(found)[-2:] == ["contradicted"] * 2


def test_a_stream_that_decay_shrinks_is_not_one_that_grows_without() -> None:
    falling = study(growth=-0.5)
    shrunk = falling.readings["arm"].eq("decay") & falling.readings["quantity"].eq("residual_rms")
    falling.readings.loc[shrunk & falling.readings["step"].eq(200), "value"] *= np.exp(-3)
    assert outcomes(symmetries.findings(falling))[3:5] == ["contradicted", "reproduced"]


def test_the_residual_is_that_of_its_own_group() -> None:
    made = study()
    other = made.readings[made.readings["quantity"] == "residual_rms"].assign(group="outputs", value=1e9)
    made.__dict__["readings"] = pd.concat([made.readings, other])
    assert outcomes(symmetries.findings(made)) == ["reproduced"] * 12


def test_a_run_that_diverged_leaves_its_claims_undecided() -> None:
    cells = [
        ({"arm": "decay", "trainer.precision": "bf16-mixed", "seed": seed}, list(readings(0.02, 0.1, 1e-3)))
        for seed in range(2)
    ]
    lost = {"arm": "no-decay", "trainer.precision": "bf16-mixed", "status": "diverged", "final_loss": float("nan")}
    cells += [(lost | {"seed": 0}, list(readings(0.6, 1, 1e-3, last=100)))]
    cells += [({**lost, "seed": 1, "status": "completed", "final_loss": 3.0}, list(readings(0.6, 1, 1e-3)))]
    found = symmetries.findings(with_group(evidence(cells)))
    assert outcomes(found) == ["undecided", "undecided", "reproduced", *["undecided"] * 4]
    assert found.statements["Divergence"] == [
        "bf16-mixed, decay: 0 of 2 runs diverged",
        "bf16-mixed, no-decay: 1 of 2 runs diverged",
    ]
    assert "1 of 4 runs diverged or were pruned" in found.warnings[0]
    saved(found)


def test_one_run_is_enough_for_a_page() -> None:
    cells = [({"arm": "decay", "trainer.precision": "32-true"}, list(readings(0.02, 0.1, 1e-6)))]
    found = symmetries.findings(with_group(evidence(cells)))
    assert set(outcomes(found)) == {"undecided"}
    saved(found)


def test_a_study_of_two_optimizers_is_refused_instead_of_averaged() -> None:
    made = study()
    made.runs.loc[::2, "optimizer"] = "muon"
    with pytest.raises(UserError, match="does not vary optimizer"):
        symmetries.findings(made)
