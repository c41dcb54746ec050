"""Where the time of one training step goes, by torch.profiler inside a run of the full Lightning path, as a table.

    python benchmarks/profile_step.py [--widths 64 512] [--steps 20] [--precision fp32|bf16] [--device cpu|cuda]
        [--json profile.json]

Every operator's own time (its kernels' time on CUDA) is booked to one group; a backward operator to the group of the
forward one that it belongs to. What no operator accounts for is Python, the data and Lightning between operators, on
CUDA the time in which the device waits. The profiler slows small operators down, so shares of a narrow model are rough.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from environment import environment, headline, write_json
from interleaving import settle
from lightning import Callback
from rivals import Setting
from torch.profiler import ProfilerActivity, profile, record_function

from lit_mult.nn.llama import MLP, Attention
from lit_mult.nn.multipliers import MultipliedMatrix
from lit_mult.training.module import LitLlama
from lit_mult.training.run import run

WEIGHTS, PRODUCTS, ATTENTION, ELEMENTS = "effective weights", "matrix products", "attention", "element-wise and norms"
LOSS, CLIPPING, OPTIMIZER, REST = "loss", "clipping", "optimizer", "Python, data and Lightning"
GROUPS = (PRODUCTS, ATTENTION, ELEMENTS, WEIGHTS, LOSS, CLIPPING, OPTIMIZER, REST)
# Ranges that the profile needs: the functions in which they lie.
RANGES: dict[str, list[tuple[type, str]]] = {
    WEIGHTS: [(MultipliedMatrix, "effective_weight"), (Attention, "form_joint_weight"), (MLP, "form_joint_weight")],
    CLIPPING: [(LitLlama, "configure_gradient_clipping")],
    ELEMENTS: [(LitLlama, "training_step"), (LitLlama, "backward")],  # whatever in them is none of the others
}
# The parts of operators' names, in the order in which they are looked for; an operator counts with all that it calls.
NAMES = {
    ATTENTION: ("scaled_dot_product", "flash_attention", "efficient_attention"),
    LOSS: ("cross_entropy", "nll_loss", "log_softmax"),
    PRODUCTS: ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
}
WARM_UP = 5


class Watch(Callback):
    """Profiles the steps after a few to warm up, and takes their wall time."""

    def __init__(self, steps: int, activities: list[ProfilerActivity]) -> None:
        self.steps, self.profile, self.seconds = steps, profile(activities=activities), 0.0
        self._count = 0

    def on_train_batch_start(self, *_: Any) -> None:
        if self._count == WARM_UP:
            settle()
            self.profile.start()
            self.seconds = -time.perf_counter()
        if self._count == WARM_UP + self.steps:
            settle()
            self.seconds += time.perf_counter()
            self.profile.stop()
        self._count += 1


@contextmanager
def marked() -> Iterator[None]:
    """With the functions of `RANGES` as ranges of the profile."""
    places = [(group, owner, name) for group, pairs in RANGES.items() for owner, name in pairs]
    originals = [vars(owner).get(name) for _, owner, name in places]
    for group, owner, name in places:
        setattr(owner, name, _in_range(group, getattr(owner, name)))
    try:
        yield
    finally:
        for (_, owner, name), original in zip(places, originals, strict=True):
            delattr(owner, name) if original is None else setattr(owner, name, original)


def _in_range(group: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any, **named: Any) -> Any:
        with record_function(group):
            return function(*arguments, **named)

    return called


def by_group(events: Any, on_device: bool) -> dict[str, float]:
    """Seconds of each group but the rest."""
    events = sorted((event for event in events if not event.is_async), key=lambda event: event.time_range.start)
    # A node of the graph has the number that its forward operator saw: the last to see it made the node.
    forward = (event for event in events if event.sequence_nr >= 0 and _node_of(event) is None)
    makers = {event.sequence_nr: event for event in forward}
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        if not event.name.startswith(("ProfilerStep", "Optimizer.step#Hybrid")) and event.name not in RANGES:
            seconds[_group(event, makers)] += own / 1e6
    return seconds


def _group(event: Any, makers: dict[int, Any]) -> str:
    names, node = [each.name for each in _with_ancestors(event)], _node_of(event)
    made_by = makers.get(node.sequence_nr) if node is not None else None
    if WEIGHTS in names or WEIGHTS in (each.name for each in _with_ancestors(made_by)):
        return WEIGHTS
    if CLIPPING in names:
        return CLIPPING
    for group, parts in NAMES.items():
        if any(part in name for name in names for part in parts):
            return group
    if node is not None or ELEMENTS in names:
        return ELEMENTS
    return OPTIMIZER if any(name.startswith("Optimizer.") for name in names) else REST


def _with_ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _node_of(event: Any) -> Any:
    """The node of the backward graph that an operator belongs to; None in the forward pass and elsewhere."""
    prefix = "autograd::engine::evaluate_function"
    return next((each for each in _with_ancestors(event) if each.name.startswith(prefix)), None)


def measure(setting: Setting, multipliers: str, steps: int) -> dict[str, float]:
    """Milliseconds of a step in each group."""
    on_device = setting.device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device
    watch = Watch(steps, activities)
    config = setting.config(multipliers, **{"train.steps": WARM_UP + steps + 1})
    with TemporaryDirectory() as folder, marked():
        run(config, folder, keep_checkpoint=False, callbacks=[watch])
    seconds = by_group(watch.profile.events(), on_device)
    seconds[REST] = watch.seconds - sum(value for group, value in seconds.items() if group != REST)
    return {group: 1e3 * value / steps for group, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    about = environment(arguments.device, precision=arguments.precision, steps=arguments.steps)
    found = {
        f"d = {width}, {multipliers}": measure(
            Setting(width, precision=arguments.precision, device=arguments.device), multipliers, arguments.steps
        )
        for width in arguments.widths
        for multipliers in ("none", "vector")
    }
    print(headline(about))
    print("| ms a step (share) |", " | ".join(found), "|\n" + "|---" * (1 + len(found)) + "|")
    totals = {name: sum(times.values()) for name, times in found.items()}
    for group in GROUPS:
        cells = (f"{times[group]:.2f} ({times[group] / totals[name]:.0%})" for name, times in found.items())
        print(f"| {group} |", " | ".join(cells), "|")
    print("| all |", " | ".join(f"{total:.2f}" for total in totals.values()), "|")
    write_json(arguments.json, about, found)


if __name__ == "__main__":
    main()
