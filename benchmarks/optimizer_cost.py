"""What a step costs under each optimizer and decay rule, over one of the base optimizer: our model in a bare loop.

    python benchmarks/optimizer_cost.py [--width 256] [--layers 4] [--time 128] [--device cpu|cuda] [--rounds 7]
        [--seconds 1] [--json optimizer_cost.json]

The loops take turns in one run, each in a process of its own; ratios are medians over rounds. Memory is the peak of a
process of its own, as in training_memory.py, the median of three.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from environment import environment, headline, write_json
from interleaving import Contestant, ratio, take_turns
from rivals import Setting, own
from training_memory import in_fresh_process

CONTESTANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw, vectors": ("adamw", "vector", {}),
    "adamw, corrected decay": ("adamw", "none", {"optim.weight_decay_mode": "corrected"}),
    "adamw, cautious decay": ("adamw", "none", {"optim.weight_decay_mode": "cautious"}),
    "hyperball": ("adamw", "none", {"optimizer": "hyperball"}),
    "sphere, softplus gains": ("adamw", "softplus", {"optimizer": "sphere"}),
    "muon, vectors": ("muon", "vector", {}),
    "muon, polar express": ("muon", "none", {"optim.muon_coefficients": "polar_express"}),
    "normuon": ("muon", "none", {"optimizer": "normuon"}),
    "muown": ("muon", "none", {"optimizer": "muown"}),
    "muon-hyperball": ("muon", "none", {"optimizer": "muon-hyperball"}),
    "muon-sphere, softplus gains": ("muon", "softplus", {"optimizer": "muon-sphere"}),
    "scion": ("muon", "none", {"optimizer": "scion", "optim.lr": 2**-12}),
}
"""Name -> base optimizer, multipliers, further settings."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--time", type=int, default=128, help="tokens of a window")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    setting = Setting(arguments.width, layers=arguments.layers, time=arguments.time, device=arguments.device)
    about = environment(arguments.device, width=setting.width, layers=setting.layers, rounds=arguments.rounds)
    settings = {base: (replace(setting, overrides={"optimizer": base}), "none") for base in ("adamw", "muon")}
    for name, (base, multipliers, more) in CONTESTANTS.items():
        settings[name] = (replace(setting, overrides={"optimizer": base, **more}), multipliers)
    contestants: dict[str, Contestant] = {name: partial(own, *its) for name, its in settings.items()}
    timings = take_turns(contestants, arguments.rounds, arguments.seconds)
    mib = {
        name: statistics.median(in_fresh_process(f"own {kind}", its, steps=3) for _ in range(3))
        for name, (its, kind) in settings.items()
    }
    print(headline(about), "| optimizer | base | step / base | memory / base |\n|---|---|---|---|", sep="\n")
    rows = []
    for name, (base, _, _) in CONTESTANTS.items():
        row = {"time": ratio(timings[name], timings[base]), "memory": mib[name] / mib[base]}
        rows.append({"optimizer": name, "base": base, **row})
        print(f"| {name} | {base} | {row['time']:.3f} | {row['memory']:.3f} |", flush=True)
    write_json(arguments.json, about, rows)


if __name__ == "__main__":
    main()
