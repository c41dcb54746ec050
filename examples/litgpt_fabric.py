"""Learnable multipliers on LitGPT's model under Lightning Fabric: a Pythia-like GPT on the bytes of a text file.

pip install litgpt
python examples/litgpt_fabric.py --text FILE [--steps 500] [--model pythia-14m]
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import Fabric
from litgpt import GPT, Config

import lit_mult

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--model", default="pythia-14m", help="a name of LitGPT's configs")
parser.add_argument("--layers", type=int, default=2)
options = parser.parse_args()

fabric = Fabric(accelerator="auto", devices=1)
fabric.seed_everything(0)
data = torch.tensor(list(options.text.read_bytes()))
model = GPT(Config.from_name(options.model, n_layer=options.layers, block_size=64, padded_vocab_size=256))

lit_mult.add_multipliers(model, kind="vector")
optimizer = lit_mult.HybridOptimizer(lit_mult.build_param_groups(model, lr=5e-3, optimizer="muon"))
model, optimizer = fabric.setup(model, optimizer)

for step in range(options.steps):
    starts = torch.randint(len(data) - 65, (16,))
    windows = fabric.to_device(torch.stack([data[start : start + 65] for start in starts]))
    loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    fabric.backward(loss)
    lit_mult.clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == options.steps - 1:
        fabric.print(f"step {step}: loss {loss.item():.3f}")
