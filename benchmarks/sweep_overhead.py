"""What a sweep adds to its cells: storage, processes and set-up, in seconds a cell.

    python benchmarks/sweep_overhead.py --workers 4 --cells 60

Runs a grid of tiny cells on each storage that needs no server and compares the time of the workers with the time that
the cells spent in training and validation. The first cell of a worker, which starts Python and imports torch, is left
out: its time is that of an import.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from lit_mult.layout import find_records
from lit_mult.schema import RunRecord
from lit_mult.study.spec import StudySpec
from lit_mult.study.sweep import sweep


def study(cells: int, steps: int) -> StudySpec:
    rates = [2.0 ** (-10 + 6 * index / (cells - 1)) for index in range(cells)]
    return StudySpec.from_dict(
        {
            "name": "overhead",
            "base": {
                "model": {"n_layers": 2, "head_dim": 16, "d_model": 32},
                "data": {"seq_len": 64, "val_windows": 16},
                "trainer": {"tensorboard": False},
            },
            "arms": {"muP": {"multipliers": "fixed"}},
            "nuisance": {"optim.lr": rates},
            "seeds": [0],
            "budget": {"steps": steps, "batch_size": 8},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--cells", type=int, default=60)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    print("storage  workers  cells  seconds of work a cell  overhead a cell, s")
    for storage in ("journal", "sqlite"):
        with tempfile.TemporaryDirectory() as folder:
            place = None if storage == "journal" else f"sqlite:///{folder}/study.db"
            warm_up = study(arguments.workers + 1, arguments.steps)
            started = time.perf_counter()
            sweep(warm_up, Path(folder) / "warm-up", arguments.workers, storage=place)
            start_up = time.perf_counter() - started
            warm_up_work = sum(_seconds(Path(folder) / "warm-up"))
            started = time.perf_counter()
            name = study(arguments.cells, arguments.steps).model_copy(update={"name": "measured"})
            sweep(name, Path(folder) / "out", arguments.workers, storage=place)
            elapsed = time.perf_counter() - started
            work = _seconds(Path(folder) / "out")
            # Both sweeps start their workers; what the longer one took beyond the shorter is for its further cells.
            further = len(work) - arguments.workers - 1
            overhead = ((elapsed - start_up) * arguments.workers - (sum(work) - warm_up_work)) / further
            row = (f"{storage:7}", f"{arguments.workers:7}", f"{len(work):5}", f"{sum(work) / len(work):22.2f}")
            print("  ".join([*row, f"{overhead:18.3f}"]))


def _seconds(folder: Path) -> list[float]:
    return [RunRecord.read(path).wall_seconds for path in find_records(folder)]


if __name__ == "__main__":
    main()
