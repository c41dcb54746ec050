"""One checkpoint through lm-eval: scores, item by item, as a record beside the run's."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lit_mult.analysis.tensorboard import add_scores
from lit_mult.data.documents import one_line
from lit_mult.errors import UserError
from lit_mult.evaluation.harness import quiet_lm_eval, simple_evaluate, task_names
from lit_mult.evaluation.runs import TrainedRun
from lit_mult.evaluation.suites import HELD_OUT, Column, Suite
from lit_mult.schema import EvaluationRecord, Score
from lit_mult.training import recording
from lit_mult.training.trained import load_trained

BATCH_SIZE = 64
"""Requests that go through the model together."""


@dataclass(frozen=True)
class Options:
    """How the tasks are run; the first three are part of what an evaluation is."""

    num_fewshot: int | None = None
    """Examples in the prompt, in place of what each task says."""
    limit: int | None = None
    """First items of each task only."""
    max_length: int | None = None
    """Tokens that the model sees at once; None: those it was trained with (data.seq_len)."""
    batch_size: int = BATCH_SIZE
    device: str | None = None
    """None: a GPU where there is one."""
    log_samples: bool = False
    """Keep every prompt and answer."""
    progress: bool = True

    def label(self, suite: Suite) -> str:
        """The suite with the options that were given."""
        parts = [suite.name]
        parts += [f"{self.num_fewshot} shots"] if self.num_fewshot is not None else []
        parts += [f"first {self.limit} items"] if self.limit is not None else []
        parts += [f"context {self.max_length}"] if self.max_length is not None else []
        return ", ".join(parts)


def evaluate_all(
    runs: Sequence[TrainedRun], suite: Suite, options: Options, *, along: bool, say: Callable[[str], None]
) -> None:
    """Evaluate the last checkpoint of every run and, `along`, those kept on the way; what is done stays done.

    `say` gets a line before each, with the time that is left, and warnings.

    Raises:
        UserError: as `evaluate`; or a run has no checkpoint.
    """
    waiting = [
        (run, step, checkpoint)
        for run in runs
        for step, checkpoint in run.checkpoints(along=along).items()
        if not _is_done(record_path(run, suite, step, options), options)
    ]
    for run, _, checkpoint in waiting:
        if not checkpoint.is_file():
            how = "a study keeps them with keep_checkpoints: true" if run.record.cell else "train it anew"
            raise UserError(f"{run.folder.path}: has no checkpoint, so nothing to evaluate; {how}")
    start = time.perf_counter()
    for number, (run, step, checkpoint) in enumerate(waiting):
        if number == 0:
            _device(options.device)
            task_names(suite)  # whether the tasks exist is said before anything is under way
        left = (time.perf_counter() - start) / number * (len(waiting) - number) if number else None
        eta = "" if left is None else f" · ETA {timedelta(seconds=round(left))}"
        say(f"{number}/{len(waiting)} evaluated{eta} · {suite.name} on {run.name}, step {step}")
        if suite.name == "mini" and (seen := _seen(run)):
            say(f"warning: {seen}")
        record = evaluate(run, suite, step, checkpoint, options)
        if record.truncated:
            say(f"warning: {record.truncated} requests are longer than the model's context and lose their beginning")


def _seen(run: TrainedRun) -> str | None:
    """Why a run may have seen lines that the embedded benchmark asks for."""
    data = run.record.config["data"]
    if not str(data["corpus"]).startswith("stdlib") or data["val_fraction"] >= HELD_OUT:
        return None
    return f"{run.name} validates on {data['val_fraction']:g} of stdlib; mini_continuation needs {HELD_OUT:g} unseen"


def evaluate(run: TrainedRun, suite: Suite, step: int, checkpoint: Path, options: Options) -> EvaluationRecord:
    """Scores of a checkpoint; one that was evaluated so before is not evaluated again.

    Raises:
        UserError: lm-eval or its data are missing, a task is unknown or fails, or the checkpoint or the corpus does not
            fit.
    """
    place = record_path(run, suite, step, options)
    if _is_done(place, options):
        return EvaluationRecord.read(place)
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
    answer = simple_evaluate(model, suite, options.num_fewshot, options.limit)
    columns = suite.columns if suite.as_group else [suite.column(name) for name in task_names(suite)]
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
        scores=[score for column in columns for score in _scores(column, answer)],
        results=_plain(answer["results"]),
    )
    if (logs := run.folder.path / "tensorboard").is_dir() and not place.is_file():
        add_scores(logs, record)
    if options.log_samples:
        _write_samples(_samples(place), answer["samples"])
    if place.is_file():  # written for samples only, or by somebody else in the meantime
        return EvaluationRecord.read(place)
    try:
        record.write(place)
    except UserError:
        if not place.is_file():
            raise
    return record


def _device(name: str | None) -> torch.device:
    """Raises: UserError when there is no such device on this machine."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise UserError(f"--device {name}: cannot be used ({one_line(error)})") from None
    return device


def record_path(run: TrainedRun, suite: Suite, step: int, options: Options) -> Path:
    """Where the record of an evaluation goes: other tasks, or other options, are another file."""
    asked = [options.label(suite), suite.identity, [(column.task, column.num_fewshot) for column in suite.columns]]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    name = suite.name if suite.name.isidentifier() else "tasks"
    return run.evaluations / f"{name}-{digest}-step={step}.json"


def _samples(place: Path) -> Path:
    return place.with_suffix("")


def _is_done(place: Path, options: Options) -> bool:
    return place.is_file() and (_samples(place).is_dir() or not options.log_samples)


def _scores(column: Column, answer: Mapping[str, Any]) -> Iterator[Score]:
    """The score of a task or, of a group that has none of its own, those of its parts."""
    results = answer["results"][column.task]
    parts = answer["group_subtasks"].get(column.task) or []
    keys = [key for key in results if "," in key and "_stderr," not in key]
    wanted = [key for metric in column.metrics for key in keys if metric in (key, key.partition(",")[0])]
    if not wanted and parts:
        for part in parts:
            yield from _scores(Column(part, column.metrics, column.side), answer)
        return
    key = next(iter(wanted or keys), None)
    if key is None:
        raise UserError(f"--tasks: {column.task}: lm-eval gives no score for it")
    metric, _, name = key.partition(",")
    leaves = _leaves(column.task, answer)
    samples = [sample for leaf in leaves for sample in answer["samples"][leaf]]
    samples = [sample for sample in samples if sample["filter"] == name and metric in sample]
    items = [sample[metric] for sample in samples]
    value = float(results[key])
    # Not every score is a mean over items (perplexity), nor every group's one that weighs its items alike.
    numbers = all(isinstance(item, int | float) for item in items)
    if not numbers or not items or not math.isclose(sum(items) / len(items), value, abs_tol=1e-9):
        items = []
    stderr = results.get(f"{metric}_stderr,{name}")
    yield Score(
        task=column.task,
        metric=metric,
        higher_is_better=bool((answer["higher_is_better"].get(leaves[0]) or {}).get(metric, False)),
        value=value,
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        items=[float(item) for item in items],
        items_hash=_items_hash(samples),
        side=column.side,
        chance=column.chance,
        num_fewshot=answer["n-shot"].get(leaves[0]),
    )


def _leaves(task: str, answer: Mapping[str, Any]) -> list[str]:
    parts = answer["group_subtasks"].get(task) or []
    return [leaf for part in parts for leaf in _leaves(part, answer)] if parts else [task]


def _items_hash(samples: list[dict[str, Any]]) -> str:
    hashes = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


def _plain(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """lm-eval's results as JSON has them: numbers that are none become null."""
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(results, default=str), parse_constant=lambda _: None)
    return plain


def _write_samples(folder: Path, samples: Mapping[str, list[dict[str, Any]]]) -> None:
    """The folder appears whole, or stays as it is."""
    scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    scratch.mkdir(parents=True)
    for task, of_task in samples.items():
        lines = (json.dumps(sample, default=str, ensure_ascii=False) + "\n" for sample in of_task)
        (scratch / f"samples_{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    if not folder.exists():
        scratch.rename(folder)
