"""What shows the cells of a study: the display of a sweep, optuna-dashboard and TensorBoard."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lit_mult.cli import main
from lit_mult.schema import RunRecord
from lit_mult.study.progress import SweepProgress
from lit_mult.study.queue import Counts
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


def test_the_display_gives_every_cell_a_line_of_its_own() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    counts = Counts(cells=4, waiting=3, cost=40.0, cost_to_come=30.0)
    progress = SweepProgress(counts, console=console)
    progress.started("a", "muP adamw 64 lr 0.0055242717 seed 0", steps=200, cost=10.0)
    progress.started("b", "vectors muon 128 lr 0.125 seed 0", steps=200, cost=10.0)
    progress.update(Counts(cells=4, waiting=1, here=2, cost=40.0, cost_to_come=10.0))
    progress.stepped("b", step=50, loss=2.5)

    console.print(progress.render())

    headline, bar, first, second = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert headline.startswith("1/4 cells")
    assert set(bar.strip()) <= {"━", "╸", "╺", "-", " "}
    assert first.split() == ["muP", "adamw", "64", "lr", "0.0055242717", "seed", "0", "step", "0/200"]
    assert second.split()[-4:] == ["step", "50/200", "loss", "2.500"]
    # A quarter of one of three cells of equal cost is done: what is left takes eleven times as long as what was.
    left = progress.seconds_left()
    assert left is not None
    assert left == pytest.approx(11 * (time.monotonic() - progress.start), rel=0.2)


def test_the_display_stays_within_a_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    progress = SweepProgress(Counts(cells=64, waiting=64, cost=64.0, cost_to_come=64.0), console=console)
    for number in range(64):
        progress.started(f"c{number}", "the same label", steps=200, cost=1.0)
    progress.update(Counts(cells=64, here=64, cost=64.0))
    for number in range(5):
        progress.stepped(f"c{number}", step=100, loss=float(number))
    console.print(progress.render())

    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[:3] for line in lines[2:]] == [["the", "same", "label"]] * 12 + [["and", "52", "more"]]
    monkeypatch.setattr("lit_mult.study.progress._PLAIN_EVERY_SECONDS", 0.0)
    progress.ended("c0", Counts(cells=64, here=63, cost=64.0), status="completed")
    said = capsys.readouterr().err
    shown = [f"the same label step 100 loss {number}.000" for number in (1, 2, 3)]
    assert said.endswith(f" · {', '.join(shown)} and 1 more\n")
    assert said.startswith("1/64 cells")
