"""Evaluates trained runs through lm-eval, and writes scores per item as a record beside each run's."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lit_mult import atomic
from lit_mult.analysis.frame import best_rates, load_records, rows
from lit_mult.analysis.tensorboard import add_scores
from lit_mult.errors import UserError, one_line
from lit_mult.evaluation.harness import quiet_lm_eval, read_scores, run_suite, task_names
from lit_mult.evaluation.suites import HELD_OUT, Suite
from lit_mult.schema import EvaluationRecord, RunRecord
from lit_mult.study.folder import StudyFolder
from lit_mult.training import recording
from lit_mult.training.folder import RunFolder
from lit_mult.training.trained import load_trained


@dataclass(frozen=True)
class TrainedRun:
    """A finished run."""

    folder: RunFolder
    record: RunRecord

    @property
    def name(self) -> str:
        return self.record.cell.cell if self.record.cell else self.folder.path.name

    def checkpoints(self, *, along: bool) -> dict[int, Path]:
        """Step -> checkpoint: the final one (even if missing) and, with `along`, those of `train.keep_every`."""
        kept = {step: self.folder.kept_checkpoint(step) for step in self.folder.kept_steps()} if along else {}
        return kept | {self.record.steps: self.folder.final_checkpoint}


def find_runs(path: Path, *, best: bool) -> list[TrainedRun]:
    """The run in a folder, or the completed runs of a study.

    With `best`, only those at the best learning rate of each arm, setting and width (`frame.best_rates`).

    Raises:
        UserError: there is no completed run.
    """
    study = StudyFolder(path)
    if study.plan.is_file():
        runs = load_records(path)
        runs = best_rates(runs) if best else runs[runs["status"] == "completed"]
        if runs.empty:
            raise UserError(f"{path}: no {'rate with all its seeds' if best else 'run of the study'} has completed")
        cells = [(study.cell(row.cell).path, Path(row.path)) for row in rows(runs)]
        return [TrainedRun(RunFolder(folder), RunRecord.read(record)) for folder, record in cells]
    if best:
        raise UserError(f"--best: {path} holds no study; leave it out, or give a study's results folder")
    folder = RunFolder(path)
    record = folder.find_record()
    if record is None:
        raise UserError(f"{path}: holds no finished run; give the folder of a run, or of a study")
    if record.status != "completed":
        raise UserError(f"{path}: the run was {record.status}, so it has no final model to evaluate")
    return [TrainedRun(folder, record)]


@dataclass(frozen=True)
class Options:
    """Options of an evaluation; the first three change its scores."""

    num_fewshot: int | None = None
    """Examples in the prompt; None: as each task sets them."""
    limit: int | None = None
    """First items of each task only."""
    max_length: int | None = None
    """Context length in tokens; None: data.seq_len."""
    batch_size: int = 64
    """Requests in a forward pass."""
    device: str | None = None
    """None: a GPU if there is one."""
    log_samples: bool = False
    """Keep every prompt and answer."""
    progress: bool = True

    def label(self, suite: Suite) -> str:
        """The suite's name with the given options."""
        options = {"{} shots": self.num_fewshot, "first {} items": self.limit, "context {}": self.max_length}
        return ", ".join([suite.name, *(text.format(n) for text, n in options.items() if n is not None)])


def evaluate_all(
    runs: Sequence[TrainedRun], suite: Suite, options: Options, *, along: bool, report: Callable[[str], None]
) -> None:
    """Evaluate the final checkpoint of every run and, with `along`, those of `train.keep_every`; skip existing records.

    `report` gets progress lines and warnings.

    Raises:
        UserError: as `evaluate`; or a run has no checkpoint.
    """
    pending = [
        (run, step, checkpoint)
        for run in runs
        for step, checkpoint in run.checkpoints(along=along).items()
        if not _is_done(record_path(run, suite, step, options), options)
    ]
    for run, _, checkpoint in pending:
        if not checkpoint.is_file():
            how = "a study keeps them with keep_checkpoints: true" if run.record.cell else "train it again"
            raise UserError(f"{run.folder.path}: has no checkpoint, so nothing to evaluate; {how}")
    if pending:  # fail on an unknown device or task before the first evaluation
        _device(options.device)
        task_names(suite)
    start, eta = time.perf_counter(), ""
    for done, (run, step, checkpoint) in enumerate(pending):
        if done:
            left = (time.perf_counter() - start) / done * (len(pending) - done)
            eta = f" · ETA {timedelta(seconds=round(left))}"
        report(f"{done}/{len(pending)} evaluated{eta} · {suite.name} on {run.name}, step {step}")
        if suite.name == "mini" and (leak := _leak(run)):
            report(f"warning: {leak}")
        record = evaluate(run, suite, step, checkpoint, options)
        if record.truncated:
            report(f"warning: {record.truncated} requests are longer than the model's context and lose their beginning")


def _leak(run: TrainedRun) -> str | None:
    """A warning if a run may have been trained on lines of the embedded benchmark."""
    data = run.record.config["data"]
    if not str(data["corpus"]).startswith("stdlib") or data["val_fraction"] >= HELD_OUT:
        return None
    return f"{run.name} validates on {data['val_fraction']:g} of stdlib; mini_continuation needs {HELD_OUT:g} unseen"


def evaluate(run: TrainedRun, suite: Suite, step: int, checkpoint: Path, options: Options) -> EvaluationRecord:
    """Scores of a checkpoint, from its record if there is one.

    Raises:
        UserError: lm-eval or its data are missing, a task is unknown or fails, or the checkpoint or the corpus does not
            match the run.
    """
    path = record_path(run, suite, step, options)
    if _is_done(path, options):
        return EvaluationRecord.read(path)
    device = _device(options.device)
    trained = load_trained(run.folder.path, checkpoint)
    config = trained.config
    with quiet_lm_eval():
        from lit_mult.evaluation.adapter import LitMultLM

        model = LitMultLM(
            trained.model,
            trained.tokenizer,
            max_length=options.max_length or config.data.seq_len,
            device=device,
            batch_size=options.batch_size,
            progress=options.progress,
        )
    started_at, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    output = run_suite(model, suite, options.num_fewshot, options.limit)
    record = EvaluationRecord(
        suite=suite.name,
        label=options.label(suite),
        config_hash=config.hash,
        seed=config.seed,
        cell=run.record.cell,
        step=step,
        last=step == run.record.steps,
        tokens=step * config.train.batch_size * config.data.seq_len,
        corpus_hash=trained.corpus.hash,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        max_length=model.max_length,
        truncated=model.truncated,
        git_commit=recording.git_commit(),
        versions=recording.versions() | {"lm_eval": version("lm_eval")},
        device=recording.describe_device(device),
        started_at=started_at,
        wall_seconds=time.perf_counter() - start,
        scores=read_scores(suite, output),
        results=_plain(output["results"]),
    )
    if options.log_samples:
        _write_samples(_samples(path), output["samples"])
    if path.is_file():  # evaluated again for its samples, or written by another process
        return EvaluationRecord.read(path)
    if run.folder.tensorboard.is_dir():
        add_scores(run.folder.tensorboard, record)
    try:
        record.write(path)
    except UserError:
        if not path.is_file():
            raise
    return record


def _device(name: str | None) -> torch.device:
    """Raises: UserError when there is no such device on this machine."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise UserError(f"--device {name}: cannot be used ({one_line(error)})") from None
    return device


def record_path(run: TrainedRun, suite: Suite, step: int, options: Options) -> Path:
    """Path of the record of an evaluation, which depends on tasks and options."""
    parts = [options.label(suite), suite.identity, [(column.task, column.num_fewshot) for column in suite.columns]]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    name = suite.name if suite.name.isidentifier() else "tasks"
    return run.folder.evaluations / f"{name}-{digest}-step={step}.json"


def _samples(record: Path) -> Path:
    """Folder of an evaluation's prompts and answers."""
    return record.with_suffix("")


def _is_done(record: Path, options: Options) -> bool:
    return record.is_file() and (_samples(record).is_dir() or not options.log_samples)


def _plain(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """lm-eval's results as plain JSON values; nan and infinity become null."""
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(results, default=str), parse_constant=lambda _: None)
    return plain


def _write_samples(folder: Path, samples: Mapping[str, list[dict[str, Any]]]) -> None:
    with atomic.new_folder(folder, keep=lambda other: True) as scratch:
        for task, of_task in samples.items():
            lines = (json.dumps(sample, default=str, ensure_ascii=False) + "\n" for sample in of_task)
            (scratch / f"samples_{task}.jsonl").write_text("".join(lines), encoding="utf-8")
