# %% [markdown]
# # Multipliers in ten minutes
#
# A weight matrix under AdamW or Muon with weight decay does not have the norm that the data ask for. Gradient noise makes
# it grow, decay makes it shrink, and where the two balance there is its norm: about `sqrt(lr / weight_decay)`, for a
# matrix that matters much and for one that matters little. *Learnable multipliers*
# ([arXiv:2601.04890](https://arxiv.org/abs/2601.04890)) put a free scale beside the matrix: the model uses
# `W_eff[i, j] = r[i] * W[i, j] * c[j]` and trains the vectors `r` and `c` along with `W`.
#
# This notebook trains one small Llama twice, without and with them, and looks at the norms. It takes less than a minute on
# a CPU core, and no network: the text is the library of the Python that runs it. Recording needs `pip install 'lit-mult[data]'`.

# %%
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch

import lit_mult

scratch = TemporaryDirectory()
folder = Path(scratch.name)
common = {
    "model": {"d_model": 32, "n_layers": 2, "head_dim": 16},
    "optim": {"lr": 0.01, "weight_decay": 0.4, "vector_lr": 0.01},
    "data": {"corpus": "stdlib", "tokenizer": "bytes", "seq_len": 32},
    "train": {"steps": 1000, "batch_size": 8, "diagnostics_every": 25},
    "trainer": {"accelerator": "cpu", "tensorboard": False, "progress_bar": False},
}

# %% [markdown]
# `lr * weight_decay * steps` is 3 here, counted at the peak rate: the run is three times as long as the balance takes, which
# is why the norms below get there. `diagnostics` asks for what is recorded on the way: `norms` are the root mean squares of `W`, `r`, `c` and
# `W_eff`, and `brownian` is the norm that pure noise gives each parameter under this very optimizer and schedule.


# %%
def train(name, multipliers, diagnostics):
    config = lit_mult.RunConfig.from_dict(common | {"multipliers": multipliers})
    config = config.with_overrides({"train.diagnostics": diagnostics})
    record = lit_mult.run(config, folder / name)
    readings = lit_mult.load_diagnostics(folder / name)
    print(f"{name}: validation loss {record.final_loss:.3f} nats per token")
    return readings.pivot_table(index="step", columns=["name", "quantity"], values="value")


plain = train("without multipliers", "none", ["norms"])
vectors = train("with multipliers", "vector", ["norms", "brownian"])

# %% [markdown]
# ## What moves, and what is held
#
# Three matrices of very different tasks. Dotted is the norm of pure noise.

# %%
shown = ["embed_tokens", "layers.0.self_attn.o_proj", "layers.0.self_attn.q_proj"]
with lit_mult.figure_style("paper"):
    figure, axes = plt.subplots(1, 3, figsize=(6.75, 2.4), sharey=True)
    for name, ax in zip(shown, axes):
        ax.plot(plain[name, "weight_rms"], "C0--", label="W, without multipliers")
        ax.plot(vectors[name, "weight_rms"], "C0", label="W, with multipliers")
        ax.plot(vectors[name, "effective_rms"], "C1", label="W_eff = r W c")
        ax.plot(vectors[name, "weight_noise_rms"].dropna(), "k:", label="pure noise")
        ax.set(title=name, xlabel="step", yscale="log")
    axes[0].set_ylabel("root mean square")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)

# %% [markdown]
# - In attention the data pull `W` away from the norm of noise where nothing else can give: `o_proj` down, `q_proj` up.
#   With multipliers `W` stays closer to it.
# - `W_eff` is what the model computes with, and its norm is free: that of the embedding ends at twice the norm of its `W`,
#   that of `o_proj` at less than half.
#
# The same in numbers, for every matrix at the end of the run. `W` spans a narrow range, `W_eff` a wide one.

# %%
end = vectors.loc[1000].unstack()[["weight_rms", "weight_noise_rms", "row_rms", "column_rms", "effective_rms"]]
end[end["row_rms"].notna()].round(3)

# %%
learned = end[end["row_rms"].notna()]
spread = learned.max() / learned.min()
print(f"largest norm over the smallest: W {spread['weight_rms']:.1f}, W_eff {spread['effective_rms']:.1f}")
assert spread["effective_rms"] > 1.5 * spread["weight_rms"]

# %% [markdown]
# ## Merged, they cost nothing
#
# `W_eff` is a matrix like any other. `merged` writes it in place of `W` and drops the vectors: the same logits, a plain
# model.

# %%
trained = lit_mult.load_trained(folder / "with multipliers")
tokens = torch.tensor(trained.tokenizer.encode("def forward(self, x):"), dtype=torch.long)[None]
merged = lit_mult.merged(trained.model)
with torch.no_grad():
    gap = (merged(tokens) - trained.model(tokens)).abs().max().item()
counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (trained.model, merged)]
print(f"{counts[0]} parameters, merged {counts[1]}; logits differ by {gap:.1e}")
assert gap < 1e-4

# %% [markdown]
# ## And then
#
# - Does it help? At equal tuning and over five seeds: [reading_a_study.ipynb](reading_a_study.ipynb).
# - On your data, with your model and your optimizer: [your_own.ipynb](your_own.ipynb).
# - `lit-mult fit --multipliers vector --diagnostics norms,brownian --out runs/a` does the same on the command line, and
#   `lit-mult export` writes the merged model for transformers.

# %%
scratch.cleanup()
