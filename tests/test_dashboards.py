"""What shows the cells of a study: the display of a sweep, optuna-dashboard and TensorBoard."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lit_mult.cli import main
from lit_mult.config import RunConfig, TrainConfig
from lit_mult.schema import RunRecord
from lit_mult.stacked.run import Member, run_stack
from lit_mult.study.progress import SweepProgress
from lit_mult.study.queue import BestLosses, Counts
from lit_mult.study.spec import StudySpec
from lit_mult.study.storage import open_storage
from lit_mult.study.sweep import sweep
from lit_mult.training.history import History
from lit_mult.training.progress import RunProgress
from lit_mult.training.run import run


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


def shown(progress: SweepProgress | RunProgress, width: int = 80) -> list[str]:
    """The live display on a terminal of this width."""
    console = Console(file=io.StringIO(), width=width)
    console.print(progress.render())
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def test_the_display_gives_every_cell_a_line_of_its_own() -> None:
    progress = SweepProgress(Counts(cells=4, waiting=3, cost=40.0, cost_to_come=30.0))
    progress.started("a", "muP adamw 64 lr 2^-7.5 seed 0", steps=200, cost=10.0)
    progress.started("b", "vectors muon 128 lr 0.125 seed 0", steps=200, cost=10.0)
    progress.update(Counts(cells=4, waiting=1, here=2, cost=40.0, cost_to_come=10.0))
    progress.stepped("b", step=50, loss=2.5)

    headline, bar, heading, first, second, hint = shown(progress)
    assert headline.startswith("1/4 cells")
    assert set(bar.strip()) <= {"━", "╸", "╺", "-", " "}
    assert heading.split() == ["2", "running", "step", "loss"]
    assert first.split() == ["muP", "adamw", "64", "lr", "2^-7.5", "seed", "0", "0/200"]
    assert second.split()[-2:] == ["50/200", "2.500"]
    assert "Ctrl-C" in hint
    # A quarter of one of three cells of equal cost is done: what is left takes eleven times as long as what was.
    left = progress.seconds_left()
    assert left is not None
    assert left == pytest.approx(11 * (time.monotonic() - progress.start), rel=0.2)


def test_the_display_stays_within_a_screen() -> None:
    best = {f"arm {number} adamw": {16: 4.0, 32: 3.0 + number} for number in range(20)}
    progress = SweepProgress(Counts(cells=64, waiting=64, cost=64.0, cost_to_come=64.0), best)
    for number in range(64):
        progress.started(f"c{number}", "a label that is longer than a terminal is wide " * 2, steps=20_000, cost=1.0)
    progress.update(Counts(cells=64, here=64, cost=64.0))
    progress.stepped("c0", step=10_000, loss=2.5)

    lines = shown(progress)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    (first,) = (line for line in lines if "10000/20000" in line)  # a label is cut, numbers are not
    assert first.rstrip().endswith("…  10000/20000  2.500")
    assert {"and 12 more", "and 56 more"} <= {line.strip() for line in lines}


def test_the_display_shows_the_best_losses_and_their_lowest() -> None:
    best = {"muP adamw": {16: 3.41, 32: 3.2}, "vectors adamw": {16: 3.4}}
    progress = SweepProgress(Counts(cells=64), best)

    assert [line.split() for line in shown(progress)[2:5]] == [
        ["best", "loss", "so", "far", "d", "=", "16", "d", "=", "32"],
        ["muP", "adamw", "3.4100", "3.2000"],
        ["vectors", "adamw", "3.4000"],
    ]
    assert progress.line().endswith(" · best 3.200 (muP adamw, d = 32)")


def test_elsewhere_than_on_a_terminal_a_line_says_it_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = SweepProgress(Counts(cells=64, waiting=64, cost=64.0, cost_to_come=64.0))
    progress.start -= 3600.0
    for number in range(64):
        progress.started(f"c{number}", "the same label", steps=200, cost=1.0)
    progress.update(Counts(cells=64, here=64, cost=64.0))
    for number in range(5):
        progress.stepped(f"c{number}", step=100, loss=float(number))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("lit_mult.training.progress._PLAIN_EVERY_SECONDS", 0.0)

    progress.ended("c0", Counts(cells=64, here=63, cost=64.0), {"muP": {32: 1.5}}, status="completed")

    said = capsys.readouterr().err
    # Of 64 cells one is done in an hour, and four are half done: a third of the 61 that are left took as long.
    assert said == (
        "1/64 cells · 1:00:00 elapsed · 1 cells/h · ETA 20:20:00 · 63 running (loss 1.000 to 4.000)"
        " · best 1.500 (muP, d = 32)\n"
    )


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_shows_its_steps_rate_and_losses(
    tiny: Callable[..., RunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lit_mult.training.progress._PLAIN_EVERY_SECONDS", 0.0)
    shown = {"trainer.progress_bar": True, "train.eval_every": 6}

    record = run(tiny(shown), tmp_path / "a")
    # The line of the last step comes before its validation.
    losses = f"training loss {record.train_curve[-1][1]:.3f} · validation loss {record.val_curve[-2][1]:.3f}"
    number = r"[\d.,]+"
    pattern = rf"step 12/12 · 0:00:\d\d elapsed · {number} steps/s · ETA 0:00:00 · {re.escape(losses)}"
    assert re.fullmatch(pattern, last_line(capsys))

    members = [Member(tiny(shown | {"seed": seed}), tmp_path / f"member {seed}") for seed in (0, 1)]
    records = run_stack(members)
    mean = sum(record.train_curve[-1][1] for record in records) / 2
    assert f" · training loss {mean:.3f} · " in last_line(capsys)

    run(tiny({"train.eval_every": 6}), tmp_path / "b")  # asks for none
    assert capsys.readouterr().err == ""


def test_the_display_of_a_run_fits_a_terminal() -> None:
    history = History(TrainConfig(steps=100_000))
    history.train_curve, history.val_curve = [(10, 2.5)], [(0, 5.5)]
    progress = RunProgress(history)
    progress.step = 50_000
    progress._start -= 10_000  # 5 steps/s

    headline, _, losses = shown(progress)
    assert headline.strip() == "step 50,000/100,000 · 2:46:40 elapsed · 5 steps/s · ETA 2:46:40"
    assert losses.strip() == "training loss 2.500 · validation loss 5.500"


def test_a_live_display_goes_away_and_leaves_what_was_printed() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with SweepProgress(Counts(cells=1, waiting=1), console=console) as progress:
        progress.print("failed muP 8: out of luck", "red")

    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[31mfailed muP 8: out of luck" in said
    assert said.rstrip().endswith("0/1 cells · 0:00:00 elapsed · ETA unknown yet")


def test_without_colours_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    SweepProgress(Counts(cells=1, waiting=1), console=console).print("failed", "red")
    assert console.file.getvalue() == "failed\n"  # type: ignore[attr-defined]


def test_a_sweep_shows_the_best_losses_of_its_records(
    folder: Path, study_dict: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown_first = []

    class Watched(SweepProgress):
        def __init__(self, counts: Counts, best: BestLosses) -> None:
            super().__init__(counts, best)
            shown_first.append(best)

    monkeypatch.setattr("lit_mult.study.sweep.SweepProgress", Watched)
    sweep(StudySpec.from_dict(study_dict(arms={"muP": {"multipliers": "fixed"}})), folder, workers=0)

    records = [RunRecord.read(path) for path in (folder / "records").glob("*.json")]
    losses = {width: [r.final_loss for r in records if r.config["model"]["d_model"] == width] for width in (8, 16)}
    assert [len(of_width) for of_width in losses.values()] == [2, 2]  # two learning rates
    assert shown_first == [{"muP": {width: min(of_width) for width, of_width in losses.items()}}]  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("rate", "written"),
    [(2**-7.5, "2^-7.5"), (0.0055242717, "2^-7.5"), (0.125, "0.125"), (3e-4, "0.0003"), (0.0123456, "0.0123")],
)
def test_a_label_has_numbers_as_a_person_writes_them(
    rate: float, written: str, study_dict: Callable[..., dict[str, Any]]
) -> None:
    spec = StudySpec.from_dict(study_dict(nuisance={"optim.lr": [rate]}))
    assert next(spec.points()).first_cell().label == f"muP 8 lr {written} seed 0"
