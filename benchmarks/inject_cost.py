"""What multipliers cost on a model of another library: Hugging Face's Llama in a bare loop, with and without them.

    python benchmarks/inject_cost.py [--widths 256 512] [--layers 4] [--time 128] [--precision fp32|bf16]
        [--device cpu|cuda] [--compile] [--rounds 9] [--seconds 1] [--json inject_cost.json]

The loops take turns in one run, each in a process of its own: ratios of time are medians over rounds. Memory is the
peak of a fresh process, as in training_memory.py.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

from environment import environment, headline, write_json
from interleaving import Contestant, ratio, take_turns
from rivals import Setting, hugging_face
from training_memory import in_fresh_process

_EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""With it glibc gives freed tensors back, so that the peak is what was allocated and not how its heap is cut up."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--time", type=int, default=128, help="tokens of a window")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    shape = {"layers": arguments.layers, "time": arguments.time}
    about = environment(arguments.device, precision=arguments.precision, **shape, rounds=arguments.rounds)
    print(headline(about), "| d | loop | time, with / without | memory, with / without |\n|---|---|---|---|", sep="\n")
    rows = []
    for width in arguments.widths:
        setting = Setting(width, precision=arguments.precision, device=arguments.device, **shape)
        loops = ("eager", "compiled") if arguments.compile else ("eager",)
        contestants: dict[str, Contestant] = {}
        for loop in loops:
            for multipliers in (None, "vector"):
                run = partial(hugging_face, setting, multipliers=multipliers, compiled=loop == "compiled")
                contestants[f"{loop} {multipliers}"] = run
        timings = take_turns(contestants, arguments.rounds, arguments.seconds)
        memory = statistics.median(
            in_fresh_process("hf vector", setting, 5, **_EXACT) / in_fresh_process("hf", setting, 5, **_EXACT)
            for _ in range(3)
        )
        for loop in loops:
            time = ratio(timings[f"{loop} vector"], timings[f"{loop} None"])
            rows.append({"width": width, "loop": loop, "time": time, "memory": memory if loop == "eager" else None})
            print(f"| {width} | {loop} | {time:.3f} | {f'{memory:.3f}' if loop == 'eager' else '-'} |", flush=True)
    write_json(arguments.json, about, rows)


if __name__ == "__main__":
    main()
