"""A study for TensorBoard: curves, scores, and factors with results as hyperparameters, written from the records."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from lit_mult.layout import find_evaluations, find_records
from lit_mult.schema import EvaluationRecord, RunRecord

FOLDER = "tensorboard"


def write_events(folder: Path | str) -> Path:
    """Write TensorBoard event files for all records in a folder, one run a cell, in place of its earlier ones.

    Returns:
        The folder of the event files, for `tensorboard --logdir`.

    Raises:
        UserError: a record is damaged.
    """
    folder = Path(folder)
    records = {path.stem if path.parent.name == "records" else path.parent.name: path for path in find_records(folder)}
    evaluations = sorted((EvaluationRecord.read(path) for path in find_evaluations(folder)), key=lambda one: one.step)
    out = folder / FOLDER
    for name, path in records.items():
        shutil.rmtree(out / name, ignore_errors=True)
        record = RunRecord.read(path)
        _write(out / name, record)
        for evaluation in evaluations:
            if (evaluation.config_hash, evaluation.cell) == (record.config_hash, record.cell):
                add_scores(out / name, evaluation)
    return out


def add_scores(out: Path, evaluation: EvaluationRecord) -> None:
    """Write the scores of an evaluation into a folder of event files, as downstream/LABEL/TASK by optimizer step."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(out))
    time = datetime.fromisoformat(evaluation.started_at).timestamp()
    for score in evaluation.scores:
        value = Summary.Value(tag=f"downstream/{evaluation.label}/{score.task}", simple_value=score.value)
        writer.add_event(Event(wall_time=time, step=evaluation.step, summary=Summary(value=[value])))
    writer.close()


def _write(out: Path, record: RunRecord) -> None:
    # TensorBoard is half a second of import, for this one purpose.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    start = datetime.fromisoformat(record.started_at).timestamp()
    writer = EventFileWriter(str(out))

    def add(step: int, summary: Any) -> None:
        # Steps spread over the time that the run took, so that the relative time axis means something.
        time = start + record.wall_seconds * step / max(1, record.steps)
        writer.add_event(Event(wall_time=time, step=step, summary=summary))

    add(0, hparams_pb(_hyperparameters(record), trial_id=out.name, start_time_secs=start))
    for tag, curve in (("train/loss", record.train_curve), ("val/loss", record.val_curve)):
        for step, loss in curve:
            add(step, Summary(value=[Summary.Value(tag=tag, simple_value=loss)]))
    for tag, value in (("final_loss", record.final_loss), ("best_loss", record.best_loss)):
        if value is not None:
            add(record.steps, Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
    writer.close()


def _hyperparameters(record: RunRecord) -> dict[str, bool | float | str]:
    values: dict[str, Any] = {"seed": record.seed, "status": record.status}
    if record.cell is not None:
        values |= {"arm": record.cell.arm} | record.cell.factors | record.cell.nuisance
    plain = (bool, int, float, str)
    return {name: value if isinstance(value, plain) else str(value) for name, value in values.items()}
