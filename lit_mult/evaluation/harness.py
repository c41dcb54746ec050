"""Calls of lm-eval: tasks and scores; silent, and offline if all data are local."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from lit_mult.errors import UserError, did_you_mean, one_line
from lit_mult.evaluation.suites import Column, Suite
from lit_mult.schema import Score

_LOCAL = {"json", "csv", "parquet", "text", "arrow"}
"""Builders of the datasets library that read files; any other name is downloaded."""
_HUB_CLIENTS = {"huggingface_hub", "datasets", "httpx", "httpx2", "requests"}


def task_names(suite: Suite) -> list[str]:
    """The tasks and groups of a suite: tags, and patterns such as `arc_*`, are expanded.

    Raises:
        UserError: lm-eval is not installed, or does not know one of them.
    """
    return list(_index(suite)[1])


def run_suite(model: Any, suite: Suite, num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
    """lm-eval's output for a suite, with samples. Raises: UserError when a task cannot be loaded or run."""
    manager, names = _index(suite)
    tasks = [suite.name] if suite.as_group else names
    with quiet_lm_eval(offline=_is_local(manager, tasks)):
        from lm_eval import simple_evaluate

        try:
            output = simple_evaluate(
                model=model,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=1000,  # for standard errors of scores that are not means
                task_manager=manager,
                verbosity="ERROR",
            )
        except UserError:
            raise
        except Exception as error:  # lm-eval raises many types
            if suite.needs and (isinstance(error, ImportError) or _is_of_the_hub(error)):
                raise UserError(f"{suite.needs} ({one_line(error)})") from None
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"--tasks {suite.name}: lm-eval cannot run them ({reason})") from error
    assert output is not None  # rank 0
    return dict(output)


def read_scores(suite: Suite, output: Mapping[str, Any]) -> list[Score]:
    """The scores of a suite's tasks in the output of `run_suite`."""
    columns = suite.columns if suite.as_group else [suite.column(name) for name in task_names(suite)]
    return [score for column in columns for score in _column_scores(column, output)]


def _column_scores(column: Column, output: Mapping[str, Any]) -> Iterator[Score]:
    """The score of a task or group, or of the parts of a group without a score."""
    results = output["results"][column.task]
    parts = output["group_subtasks"].get(column.task) or []
    keys = [key for key in results if "," in key and "_stderr," not in key]
    wanted = [key for metric in column.metrics for key in keys if metric in (key, key.partition(",")[0])]
    if not wanted and parts:
        for part in parts:
            yield from _column_scores(Column(part, column.metrics, column.side), output)
        return
    key = next(iter(wanted or keys), None)
    if key is None:
        raise UserError(f"--tasks: {column.task}: lm-eval gives no score for it")
    metric, _, name = key.partition(",")
    subtasks = _subtasks(column.task, output)
    samples = [sample for subtask in subtasks for sample in output["samples"][subtask]]
    samples = [sample for sample in samples if sample["filter"] == name and metric in sample]
    items = [sample[metric] for sample in samples]
    value = float(results[key])
    # Some scores are no mean over items (perplexity), and some groups weight their items differently.
    numeric = all(isinstance(item, int | float) for item in items)
    if not numeric or not items or not math.isclose(sum(items) / len(items), value, abs_tol=1e-9):
        items = []
    stderr = results.get(f"{metric}_stderr,{name}")
    yield Score(
        task=column.task,
        metric=metric,
        higher_is_better=bool((output["higher_is_better"].get(subtasks[0]) or {}).get(metric, False)),
        value=value,
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        items=[float(item) for item in items],
        items_hash=_items_hash(samples),
        side=column.side,
        chance=column.chance,
        num_fewshot=output["n-shot"].get(subtasks[0]),
    )


def _subtasks(task: str, output: Mapping[str, Any]) -> list[str]:
    parts = output["group_subtasks"].get(task) or []
    return [name for part in parts for name in _subtasks(part, output)] if parts else [task]


def _items_hash(samples: list[dict[str, Any]]) -> str:
    hashes = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


@contextmanager
def quiet_lm_eval(*, offline: bool = False) -> Iterator[None]:
    """Silence lm-eval and datasets; with `offline`, prevent requests that check whether local data are up to date.

    Raises:
        UserError: lm-eval is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import datasets
        import huggingface_hub.constants as hub
        import lm_eval.api.model as lm_eval_model
        import lm_eval.api.task as lm_eval_task
        import lm_eval.evaluator as lm_eval_evaluator
    except ImportError as error:
        raise UserError(f"evaluate needs lm-eval: pip install 'lit-mult[eval]' ({one_line(error)})") from None
    logger = logging.getLogger("lm_eval")
    level, bars, bar = logger.level, datasets.is_progress_bar_enabled(), lm_eval_task.tqdm
    commit = lm_eval_evaluator.get_git_commit_hash
    switches = (hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()

    def no_bar(*arguments: Any, **options: Any) -> Any:
        return bar(*arguments, **options | {"disable": True})

    lm_eval_task.tqdm = lm_eval_model.tqdm = no_bar  # the bars of building and tokenizing prompts, which is fast
    # Outside of a checkout git complains on stderr; our records have a commit of their own.
    lm_eval_evaluator.get_git_commit_hash = lambda: None
    if offline:
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = switches
        lm_eval_task.tqdm = lm_eval_model.tqdm = bar
        lm_eval_evaluator.get_git_commit_hash = commit
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@cache
def _index(suite: Suite) -> tuple[Any, tuple[str, ...]]:
    """lm-eval's index of tasks, and the suite's names in it.

    lm-eval's built-in tasks take seconds to index, and are loaded only if the suite needs them.
    """
    with quiet_lm_eval():
        from lm_eval.tasks import TaskManager

        paths = list(suite.include_paths)
        manager = TaskManager(include_path=paths, include_defaults=False)
        if not _holds(manager, _expanded(manager, suite.tasks)):
            manager = TaskManager(include_path=paths)
    names = _expanded(manager, suite.tasks)
    if unknown := [name for name in names if not _holds(manager, [name])]:
        reason = "no such task, group or tag (or a part of it is missing)"
        hint = f"; `lm-eval ls tasks` lists lm-eval's{did_you_mean(unknown[0], manager.all_tasks)}"
        raise UserError(f"--tasks: {', '.join(unknown)}: {reason}{hint}")
    return manager, tuple(names)


def _expanded(manager: Any, names: Sequence[str]) -> list[str]:
    expanded = []
    for name in names:
        matched = manager.match_tasks([name]) if any(sign in name for sign in "*?[") else [name]
        for match in matched or [name]:
            entry = manager.task_index.get(match)
            expanded += sorted(entry.tags) if entry is not None and entry.kind.name == "TAG" else [match]
    return list(dict.fromkeys(expanded))


def _holds(manager: Any, names: Sequence[str]) -> bool:
    """Whether the index has all of these tasks and groups, and the groups' parts."""
    return all(entry is not None for entry in _leaves(manager, names))


def _is_local(manager: Any, names: Sequence[str]) -> bool:
    """Whether, by their task files, all data of these tasks are local."""
    paths = [(entry.cfg or {}).get("dataset_path") for entry in _leaves(manager, names)]
    return all(path in _LOCAL or (path and Path(path).exists()) for path in paths)


def _leaves(manager: Any, names: Sequence[str]) -> Iterator[Any]:
    """Index entries of the tasks in these tasks and groups; None for a missing one."""
    for name in names:
        entry = manager.task_index.get(name)
        parts = [] if entry is None else (entry.cfg or {}).get("task")
        registered = []
        for part in parts if isinstance(parts, list) else []:
            if isinstance(part, str):
                registered.append(part)
            elif "dataset_path" not in part and not isinstance(part.get("task"), list):
                registered.append(str(part.get("group", part.get("task"))))  # with options
            # else a task or group that is defined within the group
        yield from _leaves(manager, registered) if registered else [entry]


def _is_of_the_hub(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is one of reaching for a data set."""
    while error is not None:
        modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if modules & _HUB_CLIENTS or isinstance(error, ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False
