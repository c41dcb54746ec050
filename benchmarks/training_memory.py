"""Memory that training takes: the full Lightning path against a bare loop on Hugging Face's Llama, same shapes.

    python benchmarks/training_memory.py [--widths 64 128 256 512] [--precision fp32|bf16] [--device cpu|cuda]
        [--steps 5] [--rounds 3] [--json memory.json]

Every loop runs in a fresh process that has trained the same loop at a tiny size, so that all code is in memory. On the
CPU it is the growth of the peak resident set from there, on CUDA the peak of the memory allocated; medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from environment import environment, headline, write_json
from interleaving import Over, Turns
from rivals import Setting, hugging_face, lightning, own

LOOPS = {
    "hf": hugging_face,
    "hf vector": partial(hugging_face, multipliers="vector"),
    "none": partial(lightning, multipliers="none", compiled=False),
    "vector": partial(lightning, multipliers="vector", compiled=False),
    **{f"own {kind}": partial(own, multipliers=kind) for kind in ("none", "vector", "softplus")},
}
SHOWN = ("hf", "hf vector", "own none", "none", "vector")
COMPARED = ("hf vector", "none", "vector")
TINY = {"width": 32, "layers": 1, "batch": 2, "time": 16}


class OneTurn(Turns):
    """So many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def step_starts(self) -> None:
        if not self._left:
            raise Over
        self._left -= 1


def measure(name: str, setting: Setting, steps: int) -> float:
    """MiB that as many steps of a loop take, in this process."""
    with suppress(Over):
        LOOPS[name](replace(setting, **TINY), turns=OneTurn(2))
    before = 0 if setting.device == "cuda" else _peak_rss()
    with suppress(Over):
        LOOPS[name](setting, turns=OneTurn(steps))
    peak = torch.cuda.max_memory_allocated() if setting.device == "cuda" else _peak_rss()
    return (peak - before) / 2**20


def _peak_rss() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_fresh_process(name: str, setting: Setting, steps: int, **variables: str) -> float:
    """MiB, of `measure` in a new interpreter, with these environment variables."""
    command = [sys.executable, __file__, "--measure", json.dumps([name, asdict(setting), steps])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | variables)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, setting, steps = json.loads(arguments.measure)
        print(measure(name, Setting(**setting), steps))
        return
    about = environment(arguments.device, precision=arguments.precision, steps=arguments.steps, rounds=arguments.rounds)
    print(headline(about))
    print("| d |", " | ".join(f"{name}, MiB" for name in SHOWN), *(f"| {name} / hf" for name in COMPARED), "|")
    print("|---" * (len(SHOWN) + len(COMPARED) + 1) + "|")
    results = []
    for width in arguments.widths:
        setting = Setting(width, precision=arguments.precision, device=arguments.device)
        rounds = [
            {name: in_fresh_process(name, setting, arguments.steps) for name in SHOWN} for _ in range(arguments.rounds)
        ]
        row = {name: statistics.median(each[name] for each in rounds) for name in SHOWN}
        ratios = {name: statistics.median(each[name] / each["hf"] for each in rounds) for name in COMPARED}
        results.append(
            {"width": width, "mib": row, "ratios": {f"{name} / hf": value for name, value in ratios.items()}}
        )
        cells = [f"{value:.0f}" for value in row.values()] + [f"{value:.2f}" for value in ratios.values()]
        print(f"| {width} |", " | ".join(cells), "|", flush=True)
    write_json(arguments.json, about, results)


if __name__ == "__main__":
    main()
