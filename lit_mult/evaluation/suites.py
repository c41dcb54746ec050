"""Suites of lm-eval tasks: the embedded benchmark, the paper's seven, and tasks that the user names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from lit_mult import atomic
from lit_mult.config import DataConfig
from lit_mult.data.cache import cache_dir
from lit_mult.data.corpus import hash_files, list_files, open_corpus
from lit_mult.data.encoding import digest
from lit_mult.errors import UserError
from lit_mult.mini import VERSION
from lit_mult.mini.benchmark import TASKS
from lit_mult.mini.files import write_benchmark

HELD_OUT = DataConfig().val_fraction
"""Share of the standard library from which `mini_continuation` takes lines: a run's default validation share."""


@dataclass(frozen=True)
class Column:
    """A task, or a group treated as one task, and its score."""

    task: str
    metrics: tuple[str, ...] = ("acc_norm", "acc", "exact_match")
    """lm-eval's names of the score; the first that the task has is used."""
    side: Literal["knowledge", "reasoning"] | None = None
    chance: float | None = None
    num_fewshot: int | None = None
    """Examples in the prompt; None: as the task sets them."""
    is_group: bool = False
    """Whether the name is a group's, for which lm-eval sets the number of examples differently."""


@dataclass(frozen=True)
class Suite:
    """Tasks for lm-eval."""

    name: str
    columns: tuple[Column, ...]
    include_paths: tuple[str, ...]
    """Folders of task files, besides lm-eval's own."""
    identity: str
    """Hash of the task files that are not lm-eval's: evaluations of different items have different records."""
    as_group: bool = False
    """Run the group of the suite's name, which sets the number of examples of each task."""
    needs: str = ""
    """Error message when the data cannot be downloaded."""

    @property
    def tasks(self) -> list[str]:
        """Names of its tasks, groups and tags, and patterns of them."""
        return [column.task for column in self.columns]

    def column(self, name: str) -> Column:
        """The column of a task of the suite, or of one that a tag or pattern expands to."""
        return next((column for column in (*self.columns, *MINI) if column.task == name), Column(name))


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
    mini = mini_folder()
    paths: tuple[str, ...] = (str(mini),)
    if names in ("mini", "paper"):
        if include_path is not None:
            raise UserError(f"--include_path {include_path}: goes with tasks of your own, not with --tasks {names}")
        if names == "mini":
            return Suite("mini", MINI, paths, mini.name)
        return Suite("paper", PAPER, paths, "", as_group=True, needs=_PAPER_NEEDS)
    identity = ""
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise UserError(f"--include_path {include_path}: no such folder; give one with lm-eval task files")
        paths = (*paths, include_path)
        identity = hash_files(list_files(Path(include_path), skip=lambda name: name.startswith((".", "__pycache__"))))
    tasks = [name.strip() for name in names.split(",") if name.strip()]
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserError(f"--tasks {names}: give mini, paper, or names of lm-eval tasks separated by commas, each once")
    identity += mini.name if any(name.startswith("mini") for name in tasks) else ""
    known = {column.task: column for column in MINI}
    return Suite(",".join(tasks), tuple(known.get(name, Column(name)) for name in tasks), paths, identity)


def mini_folder() -> Path:
    """The folder with the embedded benchmark and the group `paper` in the cache, written if it is not there.

    Its items of held-out text come from the running Python's standard library, so that they fit the corpus `stdlib`.

    Raises:
        UserError: the cache cannot be written.
    """
    corpus = open_corpus(DataConfig())
    folder = cache_dir(DataConfig()) / f"mini-{VERSION}-{corpus.identity.rpartition(':')[2][:16]}"

    def is_current(folder: Path) -> bool:
        task = folder / f"{TASKS[-1].name}.yaml"
        return task.is_file() and str(folder) in task.read_text()  # unless the cache was moved: its paths are absolute

    if not is_current(folder):
        try:
            with atomic.new_folder(folder, keep=is_current) as scratch:
                _write_mini(scratch, folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); set LIT_MULT_CACHE") from None
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


def _write_mini(folder: Path, final: Path) -> str:
    """Write into `folder`, which will be moved to `final`; task files hold absolute paths."""
    tasks = [{"group" if one.is_group else "task": one.task, "num_fewshot": one.num_fewshot} for one in PAPER]
    (folder / "paper.yaml").write_text(yaml.safe_dump({"group": "paper", "task": tasks}, sort_keys=False))
    texts = [document.text for document in open_corpus(DataConfig()).documents()]
    held_out = [text for text in texts if digest(text) < HELD_OUT * 2**64]
    seen = [text for text in texts if digest(text) >= HELD_OUT * 2**64]
    return write_benchmark(folder, held_out, seen, final)
