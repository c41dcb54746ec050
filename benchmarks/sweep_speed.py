"""Speed of a study: cells one after another with all threads against the default workers, and against cells in stacks.

    python benchmarks/sweep_speed.py [--full] [--rounds 2] [--json sweep.json]
    python benchmarks/sweep_speed.py --vectorize N [--widths 64 128 256] [--compile] [--device cpu|cuda] [--rounds 2]

- the study `reference` on one seed (a smaller grid of its cells; `--full`: all of them): wall time of whole sweeps, in
  turns;
  `--vectorize N` adds one with stacks of up to N cells
- with `--vectorize N`, N members (learning rates x seeds) trained as one stack against the same one after another:
  tokens/s of all members together. It is the rate between a run and one of four times the steps, so that set-up and
  compilation, which are given in seconds, are in no ratio.

Ratios are taken within a round, and medians over rounds are reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from environment import environment, headline, write_json
from rivals import Setting

from lit_mult.config import RunConfig
from lit_mult.schema import RunRecord
from lit_mult.study.files import load_study
from lit_mult.study.spec import StudySpec
from lit_mult.study.sweep import sweep
from lit_mult.training.run import run

SHORT, LONG = 20, 80


def study(full: bool) -> StudySpec:
    """The study `reference` on one seed, or a part of its cells."""
    spec = load_study("reference")
    one = spec.model_dump(mode="json", exclude_unset=True) | {"seeds": [0]}
    if full:
        return StudySpec.from_dict(one)
    return StudySpec.from_dict(
        one
        | {
            "arms": {name: spec.arms[name] for name in ("muP", "vectors")},
            "factors": spec.factors | {"model.d_model": [32, 64]},
            "nuisance": {"optim.lr": [2.0**-7.5, 2.0**-4.5]},
        }
    )


def studies(spec: StudySpec, stack: int | None, rounds: int) -> dict[str, list[float]]:
    """Seconds of whole sweeps, by round."""
    ways: dict[str, dict[str, Any]] = {"one after another": {"workers": 0}, "default workers": {}}
    if stack:
        ways[f"stacks of {stack}"] = {"vectorize": stack}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, options in list(ways.items())[:: 1 if number % 2 else -1]:
            with TemporaryDirectory() as folder:
                start = time.perf_counter()
                sweep(spec, Path(folder, "study"), **options)
                seconds[name].append(time.perf_counter() - start)
    return seconds


def one_by_one(configs: Sequence[RunConfig], folder: Path) -> list[RunRecord]:
    """Records of runs of their own."""
    return [run(config, folder / str(number), keep_checkpoint=False) for number, config in enumerate(configs)]


def stacked(configs: Sequence[RunConfig], folder: Path) -> list[RunRecord]:
    """Records of members of one stack."""
    from lit_mult.stacked.run import Member, run_stack

    members = [Member(config, folder / str(number), keep_checkpoint=False) for number, config in enumerate(configs)]
    return list(run_stack(members))


def rate(
    train: Callable[[Sequence[RunConfig], Path], list[RunRecord]], configs: list[RunConfig]
) -> tuple[float, float]:
    """Tokens/s of all configs together, set-up and compilation left out, and the seconds of these."""
    spent = {}
    for steps in (SHORT, LONG):
        longer = [config.with_overrides({"train.steps": steps}) for config in configs]
        with TemporaryDirectory() as folder:
            # A member's tokens/s count its share of the time of its stack: shares add up to the whole.
            spent[steps] = sum(record.tokens / record.tokens_per_second for record in train(longer, Path(folder)))
    step = (spent[LONG] - spent[SHORT]) / (LONG - SHORT)
    tokens = sum(config.train.batch_size * config.data.seq_len for config in configs)
    return tokens / step, spent[SHORT] - SHORT * step


def members(setting: Setting, number: int, compiled: bool) -> list[RunConfig]:
    """So many configs, of four learning rates and as many seeds as it takes."""
    base = setting.config("vector", **{"trainer.compile": compiled, "train.log_every": SHORT})
    places = [divmod(member, 4) for member in range(number)]
    return [base.with_overrides({"seed": seed, "optim.lr": 2.0 ** (-9 + 1.5 * place)}) for seed, place in places]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all cells")
    parser.add_argument("--vectorize", type=int, default=None, metavar="N")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    stack, rounds = arguments.vectorize, arguments.rounds
    spec = study(arguments.full)
    about = environment(arguments.device, cells=spec.n_cells, rounds=rounds, vectorize=stack, compile=arguments.compile)
    results: dict[str, Any] = {}

    results["study"] = seconds = studies(spec, stack, rounds)
    print(headline(about))
    print("| study | seconds | speed to one after another |\n|---|---|---|")
    alone = seconds["one after another"]
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(alone, times, strict=True))
        print(f"| {name} | {statistics.median(times):.1f} | {ratio:.2f} |", flush=True)

    if stack:
        print("\n| d | one after another, tokens/s | stack | stack / one after another | set-up, s | of the stack |")
        print("|---" * 6 + "|")
        results["stack"] = []
    for width in arguments.widths if stack else ():
        configs = members(Setting(width, batch=8, device=arguments.device), stack, arguments.compile)
        pairs = [(rate(one_by_one, configs), rate(stacked, configs)) for _ in range(rounds)]
        speeds = [statistics.median(pair[which][0] for pair in pairs) for which in (0, 1)]
        set_up = [statistics.median(pair[which][1] for pair in pairs) for which in (0, 1)]
        ratio = statistics.median(theirs[0] / ours[0] for ours, theirs in pairs)
        results["stack"].append({"width": width, "tokens_per_second": speeds, "ratio": ratio, "set_up_seconds": set_up})
        cells = [*(f"{speed:,.0f}" for speed in speeds), f"{ratio:.2f}", *(f"{each:.1f}" for each in set_up)]
        print(f"| {width} |", " | ".join(cells), "|", flush=True)
    write_json(arguments.json, about, results)


if __name__ == "__main__":
    main()
