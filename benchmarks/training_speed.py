"""Training tokens/s of the full Lightning path against a bare loop on Hugging Face's Llama, same shapes, one run.

    python benchmarks/training_speed.py [--widths 64 128 256] [--rounds 7] [--json speed.json]

The contestants take turns, a few steps each, so that a machine whose speed drifts treats them alike; the ratio of a
round is taken within that round and the median over rounds is reported. Timing starts after each is warm.

- hf: `LlamaForCausalLM` (sdpa), fused AdamW, clipping, in a bare loop
- none, vector: lit_mult under the Lightning Trainer, without multipliers and with full vectors
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback
from transformers import LlamaConfig, LlamaForCausalLM

from lit_mult.config import RunConfig
from lit_mult.training.run import run

BATCH, TIME, LAYERS, VOCABULARY = 16, 128, 4, 256


class Turns(Callback):
    """Runs a training in slices: waits for a turn before the first step of each and reports the slice's seconds."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.seconds = 0.0
        self._count = 0

    def on_train_batch_start(self, *_: Any) -> None:
        if self._count % self.steps == 0:
            self.go.acquire()
            self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self._count += 1
        if self._count % self.steps == 0:
            self.seconds = time.perf_counter() - self._start
            self.done.release()

    def turn(self) -> float:
        self.go.release()
        self.done.acquire()
        return self.seconds


def hugging_face(width: int, steps: int) -> Callable[[], float]:
    """A bare loop on the reference implementation."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=int(2.75 * width),
            num_hidden_layers=LAYERS,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    windows = torch.randint(VOCABULARY, (64, BATCH, TIME + 1))

    def turn() -> float:
        start = time.perf_counter()
        for step in range(steps):
            window = windows[step % len(windows)]
            logits = model(window[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return turn


def lit_mult(
    width: int, multipliers: str, steps: int, rounds: int, folder: Path
) -> tuple[Callable[[], float], threading.Thread]:
    """The full path: data module, Lightning Trainer, callbacks, history, clipping, schedule."""
    config = RunConfig().with_overrides(
        {
            "multipliers": multipliers,
            "model.d_model": width,
            "model.n_layers": LAYERS,
            "data.seq_len": TIME,
            "data.val_windows": 16,
            "train.batch_size": BATCH,
            "train.steps": steps * rounds,
            "train.checkpoint_every": None,
            "trainer.accelerator": "cpu",
            "trainer.progress_bar": False,
            "trainer.tensorboard": False,
        }
    )
    turns = Turns(steps)
    thread = threading.Thread(
        target=lambda: run(config, folder / f"{multipliers}-{width}", keep_checkpoint=False, callbacks=[turns]),
        daemon=True,
    )
    thread.start()
    return turns.turn, thread


def measure(width: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step, by contestant, one value a round; the first round is warm-up."""
    with TemporaryDirectory() as folder:
        contestants: dict[str, Callable[[], float]] = {"hf": hugging_face(width, steps)}
        threads = []
        for multipliers in ("none", "vector"):
            contestants[multipliers], thread = lit_mult(width, multipliers, steps, rounds + 1, Path(folder))
            threads.append(thread)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds + 1):
            for name, turn in contestants.items():
                seconds[name].append(turn() / steps)
        for thread in threads:
            thread.join()
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {LAYERS} layers, batch {BATCH} x {TIME}, fp32; tokens/s and ratio to hf")
    print("| d | hf | none | vector | none / hf | vector / hf |\n|---|---|---|---|---|---|")
    results = {}
    for width in arguments.widths:
        seconds = measure(width, steps=max(4, 1600 // width), rounds=arguments.rounds)
        rates = {name: BATCH * TIME / statistics.median(values) for name, values in seconds.items()}
        ratios = {
            name: statistics.median(hf / own for hf, own in zip(seconds["hf"], seconds[name], strict=True))
            for name in ("none", "vector")
        }
        cells = [f"{rates[name]:,.0f}" for name in rates] + [f"{ratios[name]:.2f}" for name in ratios]
        print(f"| {width} | {' | '.join(cells)} |", flush=True)
        results[width] = {"tokens_per_second": rates, "ratio_to_hf": ratios}
    if arguments.json:
        with suppress(FileExistsError):
            arguments.json.parent.mkdir(parents=True)
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
