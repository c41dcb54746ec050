"""How cost grows with width, depth, batch, steps and records: the exponent of a power law, against what is expected.

    python benchmarks/growth.py [--axes width depth batch steps records] [--rounds 5] [--seconds 0.3]
        [--records 1000 2000 4000 10000] [--json growth.json]

Time of a training step (of whole runs for steps, of whole stacks for members) is that of the Lightning path with full
vectors. Points of an axis
take turns; exponents are fitted in every round, over all points and over the two largest, and their medians count. For
records it is the time of the report on a made-up study, and the growth of peak memory, in a fresh process for each.

An exponent below the one expected is fixed cost, which weighs more at the small end; one more than 0.1 above it, over
all points or at the end, is no longer as expected.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from environment import environment, headline, write_json
from interleaving import Contestant, Turns, take_turns
from records import CELLS_OF_A_SEED, write_study
from rivals import Setting, lightning

from lit_mult.stacked.run import Member, run_stack
from lit_mult.training.run import run

TINY = Setting(width=32, layers=2, batch=4, time=64)
BASE = Setting(width=64, layers=4, batch=8, time=128)
# Axis -> expected exponent (at most) and its points.
AXES: dict[str, tuple[float, tuple[int, ...]]] = {
    "width": (2, (64, 128, 256, 512)),  # products with weights; all else grows less
    "depth": (1, (2, 4, 8, 16)),
    "batch": (1, (4, 8, 16, 32)),
    "steps": (1, (25, 50, 100, 200)),
    "members": (1, (2, 4, 8, 16)),
}
COSTS = {"steps": "seconds a run", "members": "seconds a stack"}
FIELDS = {"width": "width", "depth": "layers", "batch": "batch"}
RECORDS = (1000, 2000, 4000, 10_000)
MARGIN = 0.1


def whole_runs(steps: int, turns: Turns) -> None:
    """A contestant whose step is a whole run of a tiny model."""
    for _ in count():
        turns.step_starts()
        with TemporaryDirectory() as folder:
            run(TINY.config("vector", **{"train.steps": steps}), folder, keep_checkpoint=False)


def whole_stacks(members: int, turns: Turns) -> None:
    """A contestant whose step is the training of a stack of tiny models, each with its seed."""
    configs = [TINY.config("vector", **{"train.steps": 25, "seed": seed}) for seed in range(members)]
    for _ in count():
        turns.step_starts()
        with TemporaryDirectory() as folder:
            run_stack([Member(config, Path(folder, str(config.seed)), keep_checkpoint=False) for config in configs])


def contestant(axis: str, point: int) -> Contestant:
    """What is timed at a point of an axis."""
    match axis:
        case "steps":
            return partial(whole_runs, point)
        case "members":
            return partial(whole_stacks, point)
    return partial(lightning, replace(BASE, **{FIELDS[axis]: point}), "vector", False)


def training(axis: str, rounds: int, seconds: float) -> list[dict[int, float]]:
    """Seconds at each point of an axis, by round."""
    contestants = {str(point): contestant(axis, point) for point in AXES[axis][1]}
    timings = take_turns(contestants, rounds, seconds)
    return [{int(name): timing.steps[number] for name, timing in timings.items()} for number in range(rounds)]


def exponent(costs: Mapping[int, float]) -> float:
    """Least-squares slope of log cost against log size."""
    return float(np.polyfit(np.log(list(costs)), np.log(list(costs.values())), 1)[0])


def report(records: int) -> tuple[float, float]:
    """Seconds and growth of peak memory (MiB) of a report on so many records, in this process."""
    from lit_mult.analysis.report import write_report

    with TemporaryDirectory() as folder:
        write_study(Path(folder, "growth"), records // CELLS_OF_A_SEED)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        write_report(Path(folder, "growth"))
        took = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return took, grown / (2**20 if sys.platform == "darwin" else 1024)


def reports(sizes: list[int]) -> list[tuple[int, float, float]]:
    """(records, seconds, MiB) of each size, a fresh process each."""
    found = []
    for records in sizes:
        command = [sys.executable, __file__, "--report", str(records)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append((records, *json.loads(answer.splitlines()[-1])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=[*AXES, "records"], default=[*AXES, "records"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn")
    parser.add_argument("--records", type=int, nargs="+", default=RECORDS, help=f"multiples of {CELLS_OF_A_SEED}")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--report", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.report:
        print(json.dumps(report(arguments.report)))
        return
    about = environment("cpu", rounds=arguments.rounds, seconds_a_turn=arguments.seconds)
    print(headline(about))
    print("| axis | cost | at | measured | exponent | at the end | expected |\n" + "|---" * 7 + "|")
    results: list[dict[str, Any]] = []

    def show(axis: str, cost: str, rounds: list[dict[int, float]], expected: float) -> None:
        costs = {point: statistics.median(each[point] for each in rounds) for point in rounds[0]}
        found = statistics.median(map(exponent, rounds))
        at_end = statistics.median(exponent(dict(list(each.items())[-2:])) for each in rounds)
        row = {"axis": axis, "cost": cost, "costs": costs, "exponent": found, "at_end": at_end, "expected": expected}
        results.append(row)
        at, measured = ", ".join(map(str, costs)), ", ".join(f"{value:.3g}" for value in costs.values())
        holds = "yes" if max(found, at_end) <= expected + MARGIN else "NO"
        cells = (axis, cost, at, measured, f"{found:.2f}", f"{at_end:.2f}", f"<= {expected:g}: {holds}")
        print("|", " | ".join(cells), "|", flush=True)

    for axis in arguments.axes:
        if axis == "records":
            found = reports(arguments.records)
            for name, column in (("seconds", 1), ("MiB", 2)):
                show(axis, f"report, {name}", [{row[0]: row[column] for row in found}], 1)
        else:
            rounds = training(axis, arguments.rounds, arguments.seconds)
            show(axis, COSTS.get(axis, "seconds a step"), rounds, AXES[axis][0])
    write_json(arguments.json, about, results)


if __name__ == "__main__":
    main()
