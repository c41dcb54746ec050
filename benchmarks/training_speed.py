"""Training speed of the full Lightning path against bare loops: Hugging Face's Llama, LitGPT, nanoGPT-mup, our own.

    python benchmarks/training_speed.py [--widths 64 128 256 512] [--precision fp32|bf16] [--device cpu|cuda]
        [--compile] [--nanogpt-mup PATH] [--rounds 9] [--seconds 1] [--json speed.json]

All take turns in one run, each in a process of its own; ratios are taken within a round, and medians over rounds are
reported. 4 layers, batch 16 x 128, heads of 32, 256 tokens, fused AdamW, clipping.

- hf, litgpt, nanogpt-mup: a bare loop around the other's model (see rivals.py)
- own none: a bare loop around ours
- none, vector: lit_mult under the Lightning Trainer, without multipliers and with full vectors; `--compile` adds both
  with `trainer.compile`, whose first step, less a median step, is given in seconds and is in no ratio
- share of peak: FLOPs of a step of the Llama, attention's counted, over its time and over the speed that the same run
  measures at the step's own matrix products (see peak.py)
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from environment import environment, headline, write_json
from interleaving import Contestant, ratio, take_turns
from peak import gemms, model_flops, product_flops
from rivals import Setting, available, lightning, own

ARMS = ("none", "vector")


def measure(setting: Setting, compiled: bool, checkout: Path | None, rounds: int, seconds: float) -> dict[str, Any]:
    """Speeds, shares, ratios and seconds of compilation at one width."""
    contestants: dict[str, Contestant] = dict(available(setting, checkout)[0])
    contestants["own none"] = partial(own, setting, "none")
    contestants |= {arm: partial(lightning, setting, arm, False) for arm in ARMS}
    if compiled:
        contestants |= {f"{arm}, compiled": partial(lightning, setting, arm, True) for arm in ARMS}
    timings = take_turns(contestants | {"gemms": partial(gemms, setting)}, rounds, seconds)
    products = timings.pop("gemms")
    # FLOPs over a step's time, over FLOPs of the products over theirs.
    more = model_flops(setting) / product_flops(setting)
    pairs = [(name, "hf") for name in contestants if name != "hf"] + [("none", "own none"), ("vector", "none")]
    pairs += [(f"{arm}, compiled", arm) for arm in ARMS if compiled]
    return {
        "width": setting.width,
        "gflop_a_step": model_flops(setting) / 1e9,
        "gflops_of_products": product_flops(setting) / products.step / 1e9,
        "tokens_per_second": {name: setting.batch * setting.time / timing.step for name, timing in timings.items()},
        "share_of_peak": {name: more * ratio(products, timing) for name, timing in timings.items()},
        "speed_ratios": {f"{of} / {to}": ratio(timings[to], timings[of]) for of, to in pairs},
        "compile_seconds": {
            name: timing.first - timing.step for name, timing in timings.items() if name.endswith("compiled")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--nanogpt-mup", type=Path, default=None, help="a checkout of EleutherAI/nanoGPT-mup")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    settings = [Setting(width, precision=arguments.precision, device=arguments.device) for width in arguments.widths]
    _, missing = available(settings[0], arguments.nanogpt_mup)
    about = environment(
        arguments.device,
        precision=arguments.precision,
        layers=settings[0].layers,
        batch=f"{settings[0].batch} x {settings[0].time}",
        rounds=arguments.rounds,
        seconds_a_turn=arguments.seconds,
    )
    print(headline(about), *(f"{line}\n" for line in missing), sep="\n")
    print("| d | loop | tokens/s | to hf | share of peak | first step, s more |\n|---|---|---|---|---|---|")
    results = []
    for setting in settings:
        row = measure(setting, arguments.compile, arguments.nanogpt_mup, arguments.rounds, arguments.seconds)
        results.append(row)
        for name, speed in row["tokens_per_second"].items():
            to_hf, extra = row["speed_ratios"].get(f"{name} / hf", 1.0), row["compile_seconds"].get(name)
            cells = (setting.width, name, f"{speed:,.0f}", f"{to_hf:.2f}", f"{row['share_of_peak'][name]:.0%}")
            print("|", " | ".join(map(str, cells)), f"| {'' if extra is None else f'{extra:.1f}'} |", flush=True)
    others = [name for name in results[0]["speed_ratios"] if not name.endswith("/ hf")]
    print("\n| d | GFLOP a step | GFLOP/s of products |", " | ".join(others), "|\n" + "|---" * (3 + len(others)) + "|")
    for row in results:
        cells = [row["width"], f"{row['gflop_a_step']:.2f}", f"{row['gflops_of_products']:.0f}"]
        print("|", " | ".join(map(str, cells + [f"{row['speed_ratios'][name]:.2f}" for name in others])), "|")
    write_json(arguments.json, about, results)


if __name__ == "__main__":
    main()
