"""Records are written whole, once, and read back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from record_data import make_record

from lit_mult.config import RunConfig
from lit_mult.errors import UserError
from lit_mult.layout import find_records
from lit_mult.schema import RunRecord


@pytest.fixture
def record() -> RunRecord:
    return make_record(RunConfig(), 2.5, git_commit=None)


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
