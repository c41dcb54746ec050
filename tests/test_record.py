"""Records are written whole, once, and read back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_mult.config import RunConfig
from lit_mult.errors import UserError
from lit_mult.layout import find_records
from lit_mult.schema import RunRecord


@pytest.fixture
def record() -> RunRecord:
    config = RunConfig()
    return RunRecord(
        status="completed",
        config=config.to_dict(),
        config_hash=config.hash,
        seed=0,
        git_commit=None,
        versions={},
        device="cpu",
        started_at="2026-01-01T00:00:00+00:00",
        corpus_hash="c0ffee",
        train_tokens_available=10,
        parameters={"total": 1, "non_embedding": 1, "multipliers": 0},
        steps=2,
        tokens=32,
        wall_seconds=1.0,
        tokens_per_second=32.0,
        initial_loss=5.5,
        final_loss=2.5,
        best_loss=2.5,
        final_bits_per_byte=3.6,
        train_curve=[(2, 3.0)],
        val_curve=[(0, 5.5), (2, 2.5)],
    )


def test_a_record_comes_back_as_it_was(record: RunRecord, tmp_path: Path) -> None:
    record.write(tmp_path / "new" / "record.json")

    assert RunRecord.read(tmp_path / "new" / "record.json") == record
    assert find_records(tmp_path) == [tmp_path / "new" / "record.json"]


def test_a_record_is_never_rewritten(record: RunRecord, tmp_path: Path) -> None:
    record.write(tmp_path / "record.json")
    other = record.model_copy(update={"final_loss": 1.0})

    with pytest.raises(UserError, match="never rewritten"):
        other.write(tmp_path / "record.json")

    assert RunRecord.read(tmp_path / "record.json").final_loss == 2.5
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_record_that_cannot_be_written_leaves_nothing(record: RunRecord, tmp_path: Path) -> None:
    broken = record.model_copy(update={"initial_loss": float("nan")})  # JSON has no NaN

    with pytest.raises(ValueError, match="JSON"):
        broken.write(tmp_path / "record.json")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["", "{", '{"schema_version": 1}', "[]"])
def test_a_damaged_record_is_named(damage: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(damage)

    with pytest.raises(UserError, match=r"record\.json: not a version-1 run record"):
        RunRecord.read(tmp_path / "record.json")


def test_another_schema_version_is_refused(record: RunRecord, tmp_path: Path) -> None:
    data = record.model_dump(mode="json") | {"schema_version": 2}
    (tmp_path / "record.json").write_text(json.dumps(data))

    with pytest.raises(UserError, match="schema_version"):
        RunRecord.read(tmp_path / "record.json")
