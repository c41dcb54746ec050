"""Train a GPT-2 from scratch on the bytes of a text file, in a loop of one's own: the reference for other libraries.

python examples/bare_loop.py --text FILE [--steps 500] [--kind vector] [--width 128] [--optimizer muon]
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import lit_mult

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--kind", default="vector", help="none, scalar, vector or weight_norm")
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--optimizer", default="muon", help="adamw or muon")
options = parser.parse_args()

torch.manual_seed(0)
data = torch.tensor(list(options.text.read_bytes()))
model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=options.width, n_layer=2, n_head=4))

lit_mult.add_multipliers(model, options.kind)
groups = lit_mult.build_param_groups(model, lr=1e-2, weight_decay=0.1, optimizer=options.optimizer)
optimizer = lit_mult.HybridOptimizer(groups)

for step in range(options.steps):
    starts = torch.randint(len(data) - 65, (16,))
    batch = torch.stack([data[start : start + 64] for start in starts])
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    lit_mult.clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == options.steps - 1:
        print(f"step {step}: loss {loss.item():.3f}")
