"""Suites of lm-eval tasks: the embedded benchmark, the paper's seven, and whatever the user names."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from lit_mult.config import DataConfig
from lit_mult.data.cache import cache_dir
from lit_mult.data.corpus import hash_files, list_files, open_corpus
from lit_mult.data.encoding import digest
from lit_mult.errors import UserError
from lit_mult.mini import VERSION
from lit_mult.mini.benchmark import TASKS
from lit_mult.mini.files import write_benchmark

HELD_OUT = DataConfig().val_fraction
"""Share of the standard library whose lines `mini_continuation` asks for: what a run validates on by default."""


@dataclass(frozen=True)
class Column:
    """A task, or a group taken as one, with the score that stands for it."""

    task: str
    metrics: tuple[str, ...] = ("acc_norm", "acc", "exact_match")
    """Names of the score as lm-eval has it; the first that the task gives counts."""
    side: Literal["knowledge", "reasoning"] | None = None
    chance: float | None = None
    num_fewshot: int | None = None
    """Examples in the prompt; None: what the task says."""
    is_group: bool = False
    """Whether the name is that of a group, which matters to lm-eval where the number of examples is set."""


@dataclass(frozen=True)
class Suite:
    """What is asked of lm-eval."""

    name: str
    columns: tuple[Column, ...]
    include_paths: tuple[str, ...]
    """Folders of task files, besides lm-eval's own."""
    identity: str
    """Of the task files, as far as they are not lm-eval's: other items are another evaluation."""
    as_group: bool = False
    """Ask for the group of the suite's name, which says how many examples each task has in its prompt."""
    needs: str = ""
    """What to tell the user when the data cannot be fetched."""

    @property
    def tasks(self) -> list[str]:
        """Names of its tasks, groups and tags, and patterns of them."""
        return [column.task for column in self.columns]

    def column(self, name: str) -> Column:
        """The column of a task of the suite, or of one that a tag or pattern stands for."""
        known = {column.task: column for column in (*MINI, *self.columns)}
        return known[name] if name in known else Column(name)


MINI = tuple(Column(task.name, (task.metric,), task.side, task.chance) for task in TASKS)
"""The embedded benchmark."""

# Shots are those of the Open LLM Leaderboards, versions 1 and 2; the paper does not state its own.
PAPER = (
    Column("hellaswag", ("acc_norm",), "knowledge", 1 / 4, 10),
    Column("arc_challenge", ("acc_norm",), "knowledge", 1 / 4, 25),
    Column("mmlu", ("acc",), "knowledge", 1 / 4, 5, is_group=True),
    Column("leaderboard_mmlu_pro", ("acc",), "knowledge", 1 / 10, 5),
    Column("leaderboard_bbh", ("acc_norm",), "reasoning", None, 3, is_group=True),
    Column("gsm8k", ("exact_match,flexible-extract",), "reasoning", 0.0, 5),
    Column("leaderboard_math_hard", ("exact_match",), "reasoning", 0.0, 4, is_group=True),
)
"""The tasks of arXiv:2601.04890 table 2, in its order."""

_PAPER_NEEDS = (
    "--tasks paper needs its data sets from huggingface.co (run it where that can be reached, HF_HUB_OFFLINE unset,"
    " or once there to fill the cache) and pip install 'lit-mult[paper]'"
)


def load_suite(names: str, include_path: str | None = None) -> Suite:
    """The suite of a name, or of a comma-separated list of lm-eval tasks, groups, tags and patterns.

    Raises:
        UserError: the benchmark cannot be written, the folder of task files is none, or a name comes twice.
    """
    ours = mini_folder()
    if names in ("mini", "paper"):
        if include_path is not None:
            raise UserError(f"--include_path {include_path}: goes with tasks of your own, not with --tasks {names}")
        if names == "mini":
            return Suite("mini", MINI, (str(ours),), ours.name)
        return Suite("paper", PAPER, (str(ours),), "", as_group=True, needs=_PAPER_NEEDS)
    paths: tuple[str, ...] = (str(ours),)
    identity = ""
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise UserError(f"--include_path {include_path}: no such folder; give one with lm-eval task files")
        paths = (*paths, include_path)
        identity = hash_files(list_files(Path(include_path), skip=lambda name: name.startswith((".", "__pycache__"))))
    listed = tuple(name.strip() for name in names.split(",") if name.strip())
    if not listed or len(set(listed)) < len(listed):
        raise UserError(f"--tasks {names}: give mini, paper, or names of lm-eval tasks separated by commas, each once")
    known = {column.task: column for column in MINI}
    identity += ours.name if any(name.startswith("mini") for name in listed) else ""
    columns = tuple(known[name] if name in known else Column(name) for name in listed)
    return Suite(",".join(listed), columns, paths, identity)


def mini_folder() -> Path:
    """The folder with the embedded benchmark and the group `paper` in the cache, written if it is not there.

    Its items of held-out text come from the running Python's standard library, so that they fit the corpus `stdlib`.

    Raises:
        UserError: the cache cannot be written.
    """
    corpus = open_corpus(DataConfig())
    folder = cache_dir(DataConfig()) / f"mini-{VERSION}-{corpus.identity.rpartition(':')[2][:16]}"
    if folder.is_dir() and str(folder) not in (folder / f"{TASKS[-1].name}.yaml").read_text():
        shutil.rmtree(folder)  # the cache was moved, and task files hold absolute paths
    if not folder.is_dir():
        scratch = folder.with_name(f".{folder.name}-{os.getpid()}")
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            _write_mini(scratch, folder)
            with contextlib.suppress(OSError):  # somebody else was first
                scratch.rename(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); set LIT_MULT_CACHE") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def write_mini(folder: Path) -> str:
    """Write the embedded benchmark, and the paper's tasks as the group `paper`, for `lm_eval --include_path`.

    Returns:
        The benchmark's identity.

    Raises:
        UserError: the folder holds other files, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: is not empty; name a new folder")
        return _write_mini(folder, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


def _write_mini(folder: Path, place: Path) -> str:
    tasks = [{"group" if one.is_group else "task": one.task, "num_fewshot": one.num_fewshot} for one in PAPER]
    (folder / "paper.yaml").write_text(yaml.safe_dump({"group": "paper", "task": tasks}, sort_keys=False))
    texts = [document.text for document in open_corpus(DataConfig()).documents()]
    held_out = [text for text in texts if digest(text) < HELD_OUT * 2**64]
    seen = [text for text in texts if digest(text) >= HELD_OUT * 2**64]
    return write_benchmark(folder, held_out, seen, place)
