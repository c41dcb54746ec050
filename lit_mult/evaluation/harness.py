"""How we talk to lm-eval: which tasks there are, without its noise, and offline where nothing is to be fetched."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from lit_mult.errors import UserError, one_line
from lit_mult.evaluation.suites import Suite

_LOCAL = {"json", "csv", "parquet", "text", "arrow"}
"""Builders of the datasets library that read files; any other name is a data set to be downloaded."""


def task_names(suite: Suite) -> list[str]:
    """The tasks and groups of a suite: its tags, and patterns such as `arc_*`, are replaced by what they stand for.

    Raises:
        UserError: lm-eval is not installed, or does not know one of them.
    """
    return list(_index(suite)[1])


def simple_evaluate(model: Any, suite: Suite, num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
    """lm-eval's answer, with the samples.

    Raises:
        UserError: a task cannot be loaded or run.
    """
    manager, names = _index(suite)
    tasks = [suite.name] if suite.as_group else names
    with quiet_lm_eval(offline=_is_local(manager, tasks)):
        from lm_eval import simple_evaluate as ask

        try:
            answer = ask(
                model=model,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=1000,  # for standard errors of scores that are no means
                task_manager=manager,
                verbosity="ERROR",
            )
        except UserError:
            raise
        except Exception as error:  # of the hub, of files, of what a task requires or says: lm-eval raises anything
            if suite.needs and (isinstance(error, ImportError) or _is_of_the_hub(error)):
                raise UserError(f"{suite.needs} ({one_line(error)})") from None
            said = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"--tasks {suite.name}: lm-eval cannot run them ({said})") from error
    assert answer is not None  # rank 0
    return dict(answer)


@contextmanager
def quiet_lm_eval(*, offline: bool = False) -> Iterator[None]:
    """Keep lm-eval and datasets from talking and, with `offline`, from asking hosts whether local data are up to date.

    Raises:
        UserError: lm-eval is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import datasets
        import huggingface_hub.constants as hub
        import lm_eval.api.task as lm_eval_task
    except ImportError as error:
        raise UserError(f"evaluate needs lm-eval: pip install 'lit-mult[eval]' ({one_line(error)})") from None
    logger = logging.getLogger("lm_eval")
    level, bars, bar = logger.level, datasets.is_progress_bar_enabled(), lm_eval_task.tqdm
    switches = (hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval_task.tqdm = partial(bar, disable=True)  # a bar for each task's prompts, which are there at once
    if offline:
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = switches
        lm_eval_task.tqdm = bar
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@cache
def _index(suite: Suite) -> tuple[Any, tuple[str, ...]]:
    """lm-eval's index of tasks, and the names in it that the suite stands for.

    The index of lm-eval's own tasks takes seconds, and is left out where the suite can do without.
    """
    with quiet_lm_eval():
        from lm_eval.tasks import TaskManager

        paths = list(suite.include_paths)
        manager = TaskManager(include_path=paths, include_defaults=False)
        if not _holds(manager, _expanded(manager, suite.tasks)):
            manager = TaskManager(include_path=paths)
    names = _expanded(manager, suite.tasks)
    if unknown := [name for name in names if not _holds(manager, [name])]:
        said = f"{', '.join(unknown)}: no such task, group or tag"
        raise UserError(f"--tasks: {said} (or a part of it is missing); `lm-eval ls tasks` lists lm-eval's")
    return manager, tuple(names)


def _expanded(manager: Any, names: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        matched = manager.match_tasks([name]) if any(sign in name for sign in "*?[") else [name]
        for one in matched or [name]:
            entry = manager.task_index.get(one)
            found += sorted(entry.tags) if entry is not None and entry.kind.name == "TAG" else [one]
    return list(dict.fromkeys(found))


def _holds(manager: Any, names: Sequence[str]) -> bool:
    """Whether all of these tasks and groups are there, with the parts of groups."""
    return all(name in manager.task_index and _holds(manager, _parts(manager, name)) for name in names)


def _parts(manager: Any, name: str) -> list[str]:
    """Names of the registered tasks and groups that a group is made of."""
    parts = (manager.task_index[name].cfg or {}).get("task")
    if not isinstance(parts, list):
        return []
    named = [part if isinstance(part, str) else part.get("group", part.get("task")) for part in parts]
    # A mapping may be a whole task or group that is defined in its place.
    whole = [
        isinstance(part, dict) and ("dataset_path" in part or isinstance(part.get("task"), list)) for part in parts
    ]
    return [str(name) for name, defined in zip(named, whole, strict=True) if not defined]


def _is_local(manager: Any, names: Sequence[str]) -> bool:
    """Whether all data of these tasks are files on this machine, as far as their task files say."""
    for name in names:
        entry = manager.task_index[name]
        parts = _parts(manager, name)
        path = (entry.cfg or {}).get("dataset_path")
        if parts and not _is_local(manager, parts):
            return False
        if not parts and path not in _LOCAL and not (path and Path(path).exists()):
            return False
    return True


def _is_of_the_hub(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is one of reaching for a data set."""
    while error is not None:
        modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if modules & {"huggingface_hub", "datasets", "httpx", "httpx2", "requests"} or isinstance(
            error, ConnectionError
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
