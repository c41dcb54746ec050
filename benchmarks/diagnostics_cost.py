"""What recording costs: time spent in diagnostics over the time of training without them, in one run.

    python benchmarks/diagnostics_cost.py [--widths 64 128 256] [--every 50] [--records 7] [--json cost.json]

Every hook of the callback is timed. The cost of a recording over the time of `--every` steps of the same run, from
which recordings are left out, is the share that diagnostics add at that pace; medians over recordings. Recordings are
made more often than that, so that a slow machine is done soon: a step does not depend on the pace.

- state: norms, rows, outputs, updates and symmetry, the five that are cheap
- all: gradients and noise too, whose two extra half-batch passes cost about as much as a step
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from lit_mult.config import Diagnostic, RunConfig
from lit_mult.data.cache import prepare
from lit_mult.diagnostics.recorder import Diagnostics
from lit_mult.training.run import run

BATCH, TIME, LAYERS = 16, 128, 4
STEPS = 6  # from one recording to the next in the benchmark
GROUPS = {"state": ["norms", "rows", "outputs", "updates", "symmetry"], "all": list(get_args(Diagnostic))}


class Timed(Diagnostics):
    """Books the seconds that each step spends in the hooks, and the seconds of each step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.own_seconds: list[float] = []
        self.step_seconds: list[float] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        self._start = time.perf_counter()
        self.own_seconds.append(0.0)
        self._book(super().on_train_batch_start, *arguments)

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        self._book(super().on_before_optimizer_step, *arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        self._book(super().on_train_batch_end, *arguments)
        self.step_seconds.append(time.perf_counter() - self._start)

    def _book(self, hook: Any, *arguments: Any) -> None:
        start = time.perf_counter()
        hook(*arguments)
        self.own_seconds[-1] += time.perf_counter() - start


def measure(width: int, groups: list[str], records: int) -> tuple[float, float]:
    """Median seconds of a recording, and of a step without."""
    config = RunConfig().with_overrides(
        {
            "multipliers": "vector",
            "model.d_model": width,
            "model.n_layers": LAYERS,
            "data.seq_len": TIME,
            "data.val_windows": 16,
            "train.batch_size": BATCH,
            "train.steps": STEPS * (records + 1),  # one to warm up
            "train.diagnostics": groups,
            "train.diagnostics_every": STEPS,
            "train.checkpoint_every": None,
            "trainer.accelerator": "cpu",
            "trainer.progress_bar": False,
            "trainer.tensorboard": False,
        }
    )
    timed = Timed.of_run(config, prepare(config.data))
    unwatched = config.with_overrides({"train.diagnostics": []})
    with TemporaryDirectory() as folder:
        run(unwatched, folder, keep_checkpoint=False, callbacks=[timed])
    recordings = timed.own_seconds[STEPS::STEPS]
    steps = zip(timed.step_seconds, timed.own_seconds, strict=True)
    rest = [step - own for number, (step, own) in enumerate(steps) if number > STEPS]
    return statistics.median(recordings), statistics.median(rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--every", type=int, default=RunConfig().train.diagnostics_every)
    parser.add_argument("--records", type=int, default=7)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {LAYERS} layers, batch {BATCH} x {TIME}, fp32, vectors")
    print(f"| d | groups | recording, ms | step, ms | added every {arguments.every} steps |\n|---|---|---|---|---|")
    results: dict[str, float] = {}
    for width in arguments.widths:
        for name, groups in GROUPS.items():
            recording, step = measure(width, groups, arguments.records)
            share = results[f"{width} {name}"] = recording / (arguments.every * step)
            print(f"| {width} | {name} | {1e3 * recording:.1f} | {1e3 * step:.1f} | {share:.1%} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
