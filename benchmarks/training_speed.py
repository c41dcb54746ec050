"""Training tokens/s of the full Lightning path against a bare loop on Hugging Face's Llama, same shapes, one run.

    python benchmarks/training_speed.py [--widths 64 128 256] [--rounds 7] [--json speed.json]

The rival takes its turns inside the Lightning run, a slice of steps before each of ours, so that a machine whose speed
drifts treats both alike; the ratio is taken within a round and the median over rounds is reported.

- hf: `LlamaForCausalLM` (sdpa), fused AdamW, clipping, in a bare loop
- none, vector: lit_mult under the Lightning Trainer, without multipliers and with full vectors
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
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


class Interleaved(Callback):
    """Runs a slice of the rival's training before every slice of a Lightning training, and times both."""

    def __init__(self, rival: Callable[[], float], steps: int) -> None:
        self.rival, self.steps = rival, steps
        self.own_seconds: list[float] = []
        self.rival_seconds: list[float] = []
        self._count = 0

    def on_train_batch_start(self, *_: Any) -> None:
        if self._count % self.steps == 0:
            if self._count:
                self.own_seconds.append(time.perf_counter() - self._start)
            self.rival_seconds.append(self.rival())
            self._start = time.perf_counter()
        self._count += 1


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


def measure(width: int, multipliers: str, steps: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds a step of the full path (data, Trainer, callbacks, clipping, schedule) and of the rival, by round."""
    config = RunConfig().with_overrides(
        {
            "multipliers": multipliers,
            "model.d_model": width,
            "model.n_layers": LAYERS,
            "data.seq_len": TIME,
            "data.val_windows": 16,
            "train.batch_size": BATCH,
            "train.steps": steps * (rounds + 1) + 1,  # a round to warm up, and the step that ends the last
            "train.checkpoint_every": None,
            "trainer.accelerator": "cpu",
            "trainer.progress_bar": False,
            "trainer.tensorboard": False,
        }
    )
    turns = Interleaved(hugging_face(width, steps), steps)
    with TemporaryDirectory() as folder:
        run(config, folder, keep_checkpoint=False, callbacks=[turns])
    own, rival = turns.own_seconds[1:], turns.rival_seconds[1 : rounds + 1]
    return [second / steps for second in own], [second / steps for second in rival]


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
        row: dict[str, float] = {}
        for multipliers in ("none", "vector"):
            own, rival = measure(width, multipliers, steps=max(4, 1600 // width), rounds=arguments.rounds)
            row.setdefault("hf", BATCH * TIME / statistics.median(rival))
            row[multipliers] = BATCH * TIME / statistics.median(own)
            row[f"{multipliers} / hf"] = statistics.median(r / o for o, r in zip(own, rival, strict=True))
        results[width] = row
        speeds = " | ".join(f"{row[name]:,.0f}" for name in ("hf", "none", "vector"))
        print(f"| {width} | {speeds} | {row['none / hf']:.2f} | {row['vector / hf']:.2f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
