"""optuna-dashboard and TensorBoard show the cells of a study."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lit_mult.cli import main
from lit_mult.schema import RunRecord
from lit_mult.study.spec import StudySpec
from lit_mult.study.storage import open_storage
from lit_mult.study.sweep import sweep


@pytest.fixture
def folder(study_dict: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    sweep(StudySpec.from_dict(study_dict(arms={"muP": {"multipliers": "fixed"}})), tmp_path / "out", workers=0)
    return tmp_path / "out"


def test_tensorboard_shows_every_cell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # writing again takes the place of what was written before
        assert main(["report", str(folder), "--tensorboard"]) == 0

    assert f"tensorboard --logdir {folder / 'tensorboard'}" in capsys.readouterr().out
    records = {path.stem: RunRecord.read(path) for path in (folder / "records").glob("*.json")}
    assert {path.name for path in (folder / "tensorboard").iterdir()} == set(records)
    for name, record in records.items():
        (events,) = (folder / "tensorboard" / name).iterdir()
        shown = EventAccumulator(str(events)).Reload()
        for tag, curve in (("train/loss", record.train_curve), ("val/loss", record.val_curve)):
            assert [(e.step, pytest.approx(e.value)) for e in shown.Scalars(tag)] == curve
        assert shown.Scalars("final_loss")[0].value == pytest.approx(record.final_loss)
        content = shown.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        hyperparameters = HParamsPluginData.FromString(content).session_start_info.hparams
        assert hyperparameters["optim.lr"].number_value == record.config["optim"]["lr"]


def test_optuna_dashboard_shows_every_cell(folder: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    application = dashboard.wsgi(open_storage(folder / "optuna.journal"))

    def get(path: str) -> Any:
        status: list[str] = []
        environment = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "SERVER_NAME": "x", "SERVER_PORT": "1"}
        environment |= {"wsgi.url_scheme": "http", "SERVER_PROTOCOL": "HTTP/1.1", "QUERY_STRING": ""}
        body = b"".join(application(environment, lambda code, headers, *rest: status.append(code)))
        assert status == ["200 OK"]
        return json.loads(body)

    studies = get("/api/studies")["study_summaries"]
    assert {study["study_name"] for study in studies} == {"tiny/muP-8", "tiny/muP-16"}
    trials = get(f"/api/studies/{studies[0]['study_id']}")["trials"]
    assert [trial["state"] for trial in trials] == ["Complete", "Complete"]
