"""The benchmark as a folder that lm-eval reads: task files, data and a page that describes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_mult.mini import VERSION
from lit_mult.mini.benchmark import TASKS, benchmark
from lit_mult.mini.items import Item


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


_ANSWER = {"function": "regex", "regex_pattern": r"The answer is (-?\d+)"}
_GENERATED: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "prompt",
    "doc_to_target": "solution",
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 64},
    "filter_list": [{"name": "answer", "filter": [_ANSWER, {"function": "take_first"}]}],
    # The reference is the whole solution, so that examples in the prompt show the steps (as in GSM8K).
    "metric_list": [_mean("exact_match") | {"regexes_to_ignore": [r"(?s).*The answer is ", r"\.$"]}],
}
_CHOSEN: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "prompt",
    "doc_to_choice": "choices",
    "doc_to_target": "target",
    "metric_list": [_mean("acc"), _mean("acc_norm")],
}


def write_benchmark(folder: Path, held_out: Sequence[str], seen: Iterable[str], place: Path | None = None) -> str:
    """Write task files and data into a folder, for `lm_eval --include_path FOLDER --tasks mini`.

    Args:
        folder: where to write; it exists.
        held_out: texts that training does not see, for `mini_continuation`.
        seen: texts that it may see.
        place: where the folder will stand, if it is moved; lm-eval needs absolute paths.

    Returns:
        Digest of all items, 16 hex digits: scores compare where it is the same.
    """
    place = (place or folder).absolute()
    digest = hashlib.sha256()
    subtasks = dict[str, list[str]]()
    for name, items, examples in benchmark(held_out, seen):
        for split, rows in (("test", items), ("shots", examples)):
            text = "".join(json.dumps(_row(item)) + "\n" for item in rows)
            digest.update(text.encode())
            (folder / f"{name}.{split}.jsonl").write_text(text)
        files = {split: str(place / f"{name}.{split}.jsonl") for split in ("test", "shots")}
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "test",
            "fewshot_split": "shots",
            "metadata": {"version": VERSION},
        }
        _write(folder / f"{name}.yaml", task | (_CHOSEN if items[0].choices else _GENERATED))
        owner = next(task.name for task in TASKS if name.startswith(task.name))
        subtasks.setdefault(owner, []).append(name)
    groups = {name: parts for name, parts in subtasks.items() if parts != [name]}
    for name, parts in groups.items():
        mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
        _write(folder / f"{name}.yaml", {"group": name, "task": parts, "aggregate_metric_list": [mean]})
    for side in ("knowledge", "reasoning"):
        parts = [task.name for task in TASKS if task.side == side]
        _write(folder / f"mini_{side}.yaml", {"group": f"mini_{side}", "task": parts})
    _write(folder / "mini.yaml", {"group": "mini", "task": ["mini_knowledge", "mini_reasoning"]})
    identity = digest.hexdigest()[:16]
    (folder / "README.md").write_text(_page(identity))
    return identity


def _row(item: Item) -> dict[str, Any]:
    if not item.choices:
        return {"prompt": item.prompt, "solution": item.solution}
    return {"prompt": item.prompt, "choices": item.choices, "target": item.choices.index(item.answer)}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False, width=120))


def _page(identity: str) -> str:
    rows = "".join(
        f"| `{task.name}` | {task.side} | {task.like} | {task.measures} | {task.metric} | {task.chance:.2f} | 1.00 |\n"
        for task in TASKS
    )
    return f"""# mini, version {VERSION} ({identity})

Seven tasks in the split of arXiv:2601.04890 table 2, for models of a few million parameters trained on the mixture
`BASE+mini:SHARE`: `lm_eval --include_path FOLDER --tasks mini --model ...`. No item occurs in that training text.

| task | side | in the spirit of | what it measures | score | chance | ceiling |
|---|---|---|---|---|---|---|
{rows}
Chance is the score of guessing or, where the answer is written, the most that always giving one answer can reach. Every
item has one right answer, so the ceiling is 1; of `mini_continuation` nobody knows how near one can come to it.
"""
