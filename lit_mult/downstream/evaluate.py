"""One checkpoint through lm-eval: scores, item by item, as a record beside the run's."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lit_mult.analysis.tensorboard import add_scores
from lit_mult.data.documents import one_line
from lit_mult.downstream.runs import TrainedRun
from lit_mult.downstream.suites import HELD_OUT, Column, Suite
from lit_mult.errors import UserError
from lit_mult.record import EvaluationRecord, Score
from lit_mult.training import provenance
from lit_mult.training.trained import load_trained

BATCH_SIZE = 64
"""Requests that go through the model together."""


@dataclass(frozen=True)
class Options:
    """How the tasks are run; part of what an evaluation is."""

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
        if not record_path(run, suite, step, options).is_file()
    ]
    if waiting:
        _device(options.device)
        with _lm_eval(suite):
            _task_manager(suite)  # whether the tasks exist is said before anything is under way
    start = time.perf_counter()
    for number, (run, step, checkpoint) in enumerate(waiting):
        left = (time.perf_counter() - start) / number * (len(waiting) - number) if number else None
        eta = "" if left is None else f" · ETA {timedelta(seconds=round(left))}"
        say(f"{number}/{len(waiting)} evaluated{eta} · {suite.name} on {run.name}, step {step}")
        if suite.offline and (seen := _seen(run)):
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
        UserError: lm-eval or its data are missing, a task is unknown, or the checkpoint or the corpus does not fit.
    """
    place = record_path(run, suite, step, options)
    if place.is_file():
        return EvaluationRecord.read(place)
    trained = load_trained(run.folder.path, checkpoint)
    config = trained.config
    device = _device(options.device)
    with _lm_eval(suite):
        from lit_mult.downstream.adapter import LitMultLM

        model = LitMultLM(
            trained.model,
            trained.tokenizer,
            max_length=options.max_length or config.data.seq_len,
            device=device,
            batch_size=options.batch_size,
            progress=options.progress,
        )
        started_at, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        answer = _simple_evaluate(model, suite, options)
    record = EvaluationRecord(
        suite=suite.name,
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
        git_commit=provenance.git_commit(),
        versions=provenance.versions() | {"lm_eval": version("lm_eval")},
        device=provenance.describe_device(device),
        started_at=started_at,
        wall_seconds=time.perf_counter() - start,
        scores=[score for column in suite.columns for score in _scores(column, answer)],
        results=_plain(answer["results"]),
    )
    if options.log_samples:
        _write_samples(place.with_suffix(""), answer["samples"])
    record.write(place)
    if (logs := run.folder.path / "tensorboard").is_dir():
        add_scores(logs, record)
    return record


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name}: no torch device ({one_line(error)})") from None


def record_path(run: TrainedRun, suite: Suite, step: int, options: Options) -> Path:
    """Where the record of an evaluation goes: another suite, limit or number of shots is another file."""
    asked = [
        suite.name,
        [(column.task, column.num_fewshot) for column in suite.columns],
        options.num_fewshot,
        options.limit,
        options.max_length,
    ]
    asked += [Path(suite.include_path).name if suite.include_path else None]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    name = suite.name if suite.name.isidentifier() else "tasks"
    return run.evaluations / f"{name}-{digest}-step={step}.json"


@contextmanager
def _lm_eval(suite: Suite) -> Iterator[None]:
    """Make lm-eval quiet, offline where nothing is to be fetched, and its absence the user's to mend."""
    if suite.offline:  # read when the libraries are imported; without it they look for newer files on their hub
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import datasets
        import lm_eval.api.task as lm_eval_task
    except ImportError as error:
        raise UserError(f"evaluate needs lm-eval: pip install 'lit-mult[eval]' ({one_line(error)})") from None
    logger = logging.getLogger("lm_eval")
    level, bars, bar = logger.level, datasets.is_progress_bar_enabled(), lm_eval_task.tqdm
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval_task.tqdm = partial(bar, disable=True)  # a bar for each task's prompts, which are there at once
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval_task.tqdm = bar
        if bars:
            datasets.enable_progress_bars()


def _simple_evaluate(model: Any, suite: Suite, options: Options) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    manager = _task_manager(suite)
    try:
        answer = simple_evaluate(
            model=model,
            tasks=[suite.name] if suite.as_group else suite.tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            bootstrap_iters=1000,  # for standard errors of scores that are no means
            task_manager=manager,
            verbosity="ERROR",
        )
    except UserError:
        raise
    except Exception as error:  # of the hub, of a data set's files, of what a task requires: lm-eval raises anything
        if not (suite.needs or _is_of_the_hub(error)):
            raise
        raise UserError(f"{suite.needs or '--tasks: their data cannot be loaded'} ({one_line(error)})") from None
    assert answer is not None  # rank 0
    return dict(answer)


@cache
def _task_manager(suite: Suite) -> Any:
    """lm-eval's index of tasks; that of its own takes seconds, and is left out where the suite can do without."""
    from lm_eval.tasks import TaskManager

    if suite.include_path:
        manager = TaskManager(include_path=suite.include_path, include_defaults=False)
        if _holds(manager, suite.tasks):
            return manager
    manager = TaskManager(include_path=suite.include_path)
    if unknown := [task for task in suite.tasks if not _holds(manager, [task])]:
        where = f"lm-eval or {suite.include_path}" if suite.include_path else "lm-eval"
        raise UserError(
            f"--tasks: {', '.join(unknown)}: no such task or group in {where}; `lm-eval ls tasks` lists them"
        )
    return manager


def _holds(manager: Any, names: Sequence[str]) -> bool:
    """Whether all of these tasks and groups are there, with the parts of groups."""
    for name in names:
        if name not in manager.task_index:
            return False
        parts = (manager.task_index[name].cfg or {}).get("task")
        if isinstance(parts, list) and not _holds(manager, [part for part in parts if isinstance(part, str)]):
            return False
    return True


def _is_of_the_hub(error: Exception) -> bool:
    return any(kind.__module__.startswith(("huggingface_hub", "datasets", "httpx")) for kind in type(error).__mro__)


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
    samples = [sample for leaf in _leaves(column.task, answer) for sample in answer["samples"][leaf]]
    samples = [sample for sample in samples if sample["filter"] == name and metric in sample]
    items = [sample[metric] for sample in samples]
    value = float(results[key])
    numbers = all(isinstance(item, int | float) for item in items)
    if not numbers or not items or not math.isclose(sum(items) / len(items), value, abs_tol=1e-9):
        items = []
    stderr = results.get(f"{metric}_stderr,{name}")
    yield Score(
        task=column.task,
        metric=metric,
        value=value,
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        items=[float(item) for item in items],
        items_hash=_items_hash(samples),
        side=column.side,
        chance=column.chance,
        num_fewshot=answer["n-shot"].get(_leaves(column.task, answer)[0]),
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
    folder.mkdir(parents=True, exist_ok=True)
    for task, of_task in samples.items():
        lines = (json.dumps(sample, default=str, ensure_ascii=False) + "\n" for sample in of_task)
        (folder / f"samples_{task}.jsonl").write_text("".join(lines), encoding="utf-8")
