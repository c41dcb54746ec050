"""What to look at after a run or a study: commands that apply to it, and what they are for."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_mult.schema import RunRecord
    from lit_mult.study.spec import StudySpec

Step = tuple[str, str]
"""A command, and its purpose in few words, as both are to fit a line."""


def after_fit(record: RunRecord, out: str) -> Iterator[Step]:
    """After `fit`: for a run that did not diverge, its scores and its export where what they need is installed."""
    folder = shlex.quote(out)
    yield f"lit-mult report {folder}", "losses, caveats"
    if record.status == "diverged":
        return
    if find_spec("lm_eval"):
        yield f"lit-mult evaluate {folder}", "benchmark scores"
    if find_spec("transformers"):
        yield f"lit-mult export {folder} {shlex.quote(f'{out}-hf')}", "for transformers"


def after_sweep(spec: StudySpec, out: str) -> Iterator[Step]:
    """After `sweep`: the preset of a tuning study, scores where there are checkpoints, arms side by side."""
    folder, arms = shlex.quote(out), list(spec.arms)
    if spec.search_multipliers:
        arm = f" --arm {arms[0]}" if len(arms) > 1 else ""
        yield f"lit-mult preset {folder}{arm} -o tuned.yaml", "the best trials"
    if spec.keep_checkpoints and find_spec("lm_eval"):
        yield f"lit-mult evaluate {folder} --best", "scores of the best"
    if len(arms) > 1 and not spec.search_multipliers:
        sides = " ".join(shlex.quote(f"{out}:{arm}") for arm in arms[:2])
        yield f"lit-mult compare {sides}", "differences, cost"
