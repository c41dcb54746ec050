"""The command doctor: what this machine can do, what is broken, and which options pay here."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_mult.cli.parsing import FAILED, add_json, make_parser
from lit_mult.cli.printing import print_json, say

_LITTLE_SPACE_GIB = 1.0


def doctor(arguments: Sequence[str]) -> int:
    """Show what this machine can do and which options pay on it; exit code 1 if something needed is broken."""
    parser = make_parser("doctor", doctor)
    keys = "versions, processor, gpus, speed, compiler, extras (what each lacks), cache, results, offline"
    add_json(parser, f"{keys}, problems, advice")
    namespace = parser.parse_args(list(arguments))

    from lit_mult.cli import machine

    found = {
        "versions": machine.versions(),
        "processor": machine.processor(),
        "gpus": machine.gpus(),
        "speed": machine.speed(),
        "compiler": machine.compiler(),
        "extras": machine.missing_of_extras(),
        "cache": machine.token_cache(),
        "results": machine.results(),
        "offline": os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"),
    }
    problems, advice = list(_problems(found)), list(_advice(found, machine.EXTRAS))
    if namespace.json:
        print_json(found | {"problems": problems, "advice": advice})
    else:
        print(machine.headline(), end="\n\n")
        for name, value in _facts(found):
            print(f"{name:12}{value}")
        print()
        for line in problems:
            say(f"broken: {line}", "bold red")
        for line in advice:
            say(f"- {line}")
    return FAILED if problems else 0


def _facts(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    main = ("torch", "lightning", "optuna", "pandas", "scipy", "jsonargparse")
    yield "versions", ", ".join(f"{name} {found['versions'].get(name, {}).get('version')}" for name in main)
    cpu = found["processor"]
    bf16 = f"bf16 by {', '.join(cpu['bf16_instructions'])}" if cpu["bf16_instructions"] else "no unit for bf16"
    yield "processor", f"{cpu['name']}: {cpu['cores']} cores, {cpu['threads']} threads, {bf16}"
    free = "" if math.isnan(cpu["free_memory_gib"]) else f", {cpu['free_memory_gib']:.1f} free"
    yield "memory", f"{cpu['memory_gib']:.1f} GiB{free}"
    gpus = [f"{gpu['name']} ({gpu['memory_gib']:.0f} GiB{', bf16' * gpu['bf16']})" for gpu in found["gpus"]]
    yield "GPUs", ", ".join(gpus) or "none"
    yield "products", ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in found["speed"].items())
    yield "compiler", found["compiler"] or "no C++ compiler"
    yield "extras", ", ".join(extra for extra, lacking in found["extras"].items() if not lacking) or "none"
    cache, results = found["cache"], found["results"]
    yield "token cache", f"{cache['path']}: {cache['size_gib']:.2g} GiB, {cache['free_gib']:,.0f} GiB free"
    yield "results", f"{results['path']}: {results['free_gib']:,.0f} GiB free"
    if found["offline"]:
        yield "network", "HF_HUB_OFFLINE: data sets, tokenizers and tasks of Hugging Face come from their cache alone"


def _problems(found: dict[str, Any]) -> Iterator[str]:
    for name, one in found["versions"].items():
        if not one["fits"]:
            here = f"{name} {one['version'] or 'is not installed'}"
            yield f"{here}: must be {one['supported']}: pip install '{name}{one['supported']}'"
    for folder, remedy in (("cache", "set LIT_MULT_CACHE to another folder"), ("results", "give --out another folder")):
        if not found[folder]["writable"]:
            yield f"{found[folder]['path']}: cannot be written; {remedy}"
        elif found[folder]["free_gib"] < _LITTLE_SPACE_GIB:
            yield f"{found[folder]['path']}: {found[folder]['free_gib']:.1f} GiB are left; free some, or {remedy}"


def _advice(found: dict[str, Any], extras: Mapping[str, str]) -> Iterator[str]:
    """Which options pay here. The figures are those of docs/performance.md."""
    cpu, speed = found["processor"], found["speed"]
    if found["gpus"]:
        yield "sweep --vectorize auto, the default, fills a GPU with cells of equal shapes, trained as one model."
    else:
        gain = " (two are 1.4 times as fast as one cell after another)" if cpu["cores"] > 1 else ""
        workers = f"sweep runs a worker of one thread on each core{gain}."
        stacks = "Stacks pay below width 64, where the overhead of a step is most of it"
        yield f"{workers} {stacks}: --vectorize 9 (at width 32, 6 ms a step in place of 14)."
    compiled = (
        "--trainer.compile true pays for runs of 1,200 steps and more, or 200 where the model was compiled before"
    )
    yield compiled + (": 1.1 to 1.4 times as fast." if found["compiler"] else "; it needs a C++ compiler, such as g++.")
    ratio = speed["bfloat16"] / speed["float32"]
    if cpu["load"] > cpu["cores"]:
        yield f"Others use this machine, too (load {cpu['load']:.0f} on {cpu['cores']} cores): speeds are low for now."
    elif ratio > 1.5:
        yield f"Products in bf16 are {ratio:.1f} times as fast: try --trainer.precision bf16-mixed from width 256 on."
    else:
        yield f"Products in bf16 have {ratio:.1f} of the speed of float32: leave --trainer.precision at 32-true."
    for extra, lacking in found["extras"].items():
        if lacking:
            yield f"pip install 'lit-mult[{extra}]' brings {extras[extra]} (not here: {', '.join(lacking)})."
