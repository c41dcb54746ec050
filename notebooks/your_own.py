# %% [markdown]
# # Your own data, size and method
#
# Three ways from here to a result of your own: a text of yours in a model of this package, an optimizer of yours in a
# study, and multipliers on a model of yours in a training loop of yours. Each is short enough to read at once. The
# notebook takes less than a minute on a CPU core, and no network.

# %%
# %matplotlib inline
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import lit_mult

scratch = TemporaryDirectory()
folder = Path(scratch.name)

# %% [markdown]
# ## Your data and your size
#
# `data.corpus` takes a file or a folder of text, JSONL or parquet. Part of it is kept for validation. Each field of the
# config is one option of the command line; `lit-mult fit --help` lists them all with their defaults.

# %%
text = folder / "mine.txt"
text.write_text("".join(f"{n} times {m} is {n * m}.\n" for n in range(2, 80) for m in range(2, 80)))

settings = {
    "multipliers": "vector",
    "optimizer": "muon",
    "model": {"d_model": 32, "n_layers": 2, "head_dim": 16, "mlp_ratio": 2.0},
    "optim": {"lr": 0.01, "weight_decay": 0.4},
    "data": {"corpus": str(text), "tokenizer": "bpe:300", "seq_len": 32, "cache_dir": str(folder / "cache")},
    "train": {"steps": 150, "batch_size": 8},
    "trainer": {"accelerator": "cpu", "tensorboard": False, "progress_bar": False},
}
record = lit_mult.run(lit_mult.RunConfig.from_dict(settings), folder / "run")
print(f"{record.initial_loss:.2f} -> {record.final_loss:.2f} nats per token, {record.parameters['total']} parameters")

# %% [markdown]
# A field that is wrong says what is allowed, before anything is trained:

# %%
try:
    lit_mult.RunConfig.from_dict(settings | {"model": {"d_model": 33}})
except lit_mult.ConfigError as error:
    print(error)

# %% [markdown]
# ## Your method
#
# An optimizer is named by its import path, so a class in a file of yours will do: any `torch.optim.Optimizer`. It trains
# the hidden matrices, and AdamW the rest. Here it is Signum, whose step is the sign of the momentum.

# %%
source = '''
import torch


class Signum(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, weight_decay=0.0, momentum=0.9):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(average.sign(), alpha=-group["lr"])
        return loss
'''
(folder / "signum.py").write_text(source)
sys.path.insert(0, str(folder))

# %% [markdown]
# A study compares *arms*, each with its rates searched, at equal data and over equal seeds. As a file it is run by
# `lit-mult sweep mine.yaml`; here it is a dict. Sixty steps, three rates and three seeds are few: enough to see the
# machinery, not to conclude.

# %%
study = lit_mult.StudySpec.from_dict(
    {
        "name": "mine",
        "base": {name: settings[name] for name in ("model", "data", "trainer")}
        | {"parametrization": {"rule": "standard"}, "optim": {"weight_decay": 0.1}},
        "arms": {
            "AdamW": {"optimizer": "adamw", "multipliers": "none"},
            "Signum": {"optimizer": "import:signum.Signum", "multipliers": "none"},
            "Signum-vectors": {"optimizer": "import:signum.Signum", "multipliers": "vector"},
        },
        "nuisance": {"optim.lr": [0.002, 0.008, 0.032]},
        "seeds": [0, 1, 2],
        "budget": {"steps": 60, "batch_size": 8},
        "sampler": "grid",
    }
)
result = lit_mult.sweep(study, folder / "study", workers=0)  # in this process

# %%
runs = lit_mult.load_records(folder / "study")
lit_mult.loss_vs_lr(runs, lit_mult.sensitivity_points(runs), lit_mult.arm_labels(runs))

# %% [markdown]
# An optimizer that is to stay has an entry in the registry, with what this route leaves out: how its rate scales with
# width (muP), its noise, training many runs as one. A package adds entries, of optimizers and of kinds of multipliers, by
# entry points: CONTRIBUTING.md has the lines.
#
# ## Your model
#
# Multipliers go on any `torch.nn.Module`, in place. `roles` says which matrix is which; for models of transformers and
# other libraries it is known.


# %%
class Model(nn.Module):
    def __init__(self, vocabulary=256, d=32):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.up, self.down = nn.Linear(2 * d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        pairs = torch.cat([x[:, 1:], x[:, :-1]], dim=-1)  # a byte and the one before it
        return self.head(x[:, 1:] + self.down(torch.relu(self.up(pairs))))


torch.manual_seed(0)
roles = {"embed": "embedding", "up": "up_proj", "down": "down_proj", "head": "lm_head"}
model = lit_mult.add_multipliers(Model(), kind="vector", roles=roles)

# %%
groups = lit_mult.build_param_groups(model, lr=0.003, weight_decay=0.1, optimizer="muon")
optimizer = lit_mult.HybridOptimizer(groups)
data = torch.tensor(list(text.read_bytes()))

for step in range(300):
    starts = torch.randint(len(data) - 33, (16, 1))
    batch = data[starts + torch.arange(33)]
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 2:].flatten())
    loss.backward()
    lit_mult.clip_grad_norm_(model, 1.0)  # the norm and the scaling without the multipliers
    optimizer.step()
    optimizer.zero_grad()
    if step % 100 == 0 or step == 299:
        print(f"step {step}: {loss.item():.3f} nats per byte")

# %%
print(lit_mult.parameters(model, groups))

# %% [markdown]
# At the end the multipliers go into the weights, and the model is a plain one again, with the same outputs:

# %%
with torch.no_grad():
    before = model(batch[:, :-1])
    lit_mult.merge_and_unload(model)
    assert torch.allclose(model(batch[:, :-1]), before, atol=1e-4)
print(sorted(model.state_dict()))

# %%
scratch.cleanup()
