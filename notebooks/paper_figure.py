# %% [markdown]
# # From records to a figure for a paper
#
# The figures of `lit-mult report` suit a page as they are (`--style paper`, `--width column`). When they do not say what
# you want to say, the records do: this notebook takes those of `results/pays` to a figure of your own in a column's
# width, with intervals, and to a table in LaTeX. It trains nothing and needs no torch.

# %%
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import pandas as pd

import lit_mult

folder = Path("../results/pays")
runs = lit_mult.load_records(folder)
points = lit_mult.sensitivity_points(runs)

# %% [markdown]
# ## What to compare
#
# A row of `points` is one curve: an arm at one setting (here the optimizer), width and seed, with its loss at the best
# rate. Rates are chosen by the mean over seeds, so `best_loss` is not the luck of a seed. `paired_differences` compares
# rows of equal seed, which saw the same data in the same order, and gives 95 % intervals of Student's t over the seeds.

# %%
differences = lit_mult.paired_differences(points)
chosen = differences.query("between == 'arm' and against == 'muP' and measure == 'best_loss' and d_model == 'all'")
chosen = chosen[["of", "within", "seeds", "difference", "low", "high"]]
chosen.round(4)

# %% [markdown]
# ## The figure
#
# `figure_style` sets matplotlib's rcParams: sizes for a page of ICML or NeurIPS, colours that all readers can tell apart.
# Whatever you set inside counts, so the font of your paper goes there too. Use `plt` as always.

# %%
words = lit_mult.arm_labels(runs)
words

# %%
order = ["vectors", "muP-tuned", "vectors-tuned"]
names = {
    "vectors": "learnable multipliers",
    "muP-tuned": "tuned muP",
    "vectors-tuned": "learnable multipliers\non tuned muP",
}
with lit_mult.figure_style("paper", width="column"), plt.rc_context({"font.family": "serif"}):
    figure, ax = plt.subplots(figsize=(3.25, 1.8))
    for shift, (optimizer, rows) in zip((-0.12, 0.12), chosen.groupby("within")):
        rows = rows.set_index("of").loc[order]
        y = [order.index(arm) + shift for arm in rows.index]
        errors = [rows["difference"] - rows["low"], rows["high"] - rows["difference"]]
        ax.errorbar(rows["difference"], y, xerr=errors, fmt="os"[shift > 0], capsize=1.5, label=optimizer)
    ax.axvline(0, color="0.3", lw=0.8)
    ax.set(yticks=range(len(order)), yticklabels=[names[arm] for arm in order], ylim=(2.5, -0.5))
    ax.set_xlabel("best loss - muP's (nats per token)")
    figure.legend(loc="outside upper center", ncols=2)

# %% [markdown]
# Below 0, an arm ends lower than muP as it comes. Bars are 95 % intervals over five seeds. Saved as PDF (with type that
# publishers accept) and SVG:

# %%
scratch = TemporaryDirectory()
with lit_mult.figure_style("paper", width="column"):
    for ending in ("pdf", "svg"):
        figure.savefig(Path(scratch.name, f"gains.{ending}"))
sorted(f"{path.name}: {path.stat().st_size // 1000} kB" for path in Path(scratch.name).iterdir())

# %% [markdown]
# ## The table
#
# `to_latex` takes a table of strings, as you want to see them, and writes a `tabular` with the rules of booktabs: numbers
# in math, columns of numbers on the right, special characters escaped. The comments say where it comes from. Every
# table of a report lies in `tables/*.tex` already.

# %%
table = chosen.pivot(index="of", columns="within").loc[order]
shown = {"arm": [names[arm].replace("\n", " ") for arm in order]}
for optimizer in ("AdamW", "Muon"):
    cells = table.xs(optimizer, axis=1, level="within")
    shown[optimizer] = [f"{row.difference:+.3f}" for row in cells.itertuples()]
    shown[f"95 % ({optimizer})"] = [f"[{row.low:+.3f}, {row.high:+.3f}]" for row in cells.itertuples()]

comments = ["best loss - muP's, from results/pays", f"commits: {', '.join(sorted(set(runs['git_commit'])))}"]
print(lit_mult.to_latex(pd.DataFrame(shown), comments))

# %% [markdown]
# ## The package's own figures, in your style
#
# They draw in whatever is in force. `figure_style(None)` leaves the rcParams to you:

# %%
with lit_mult.figure_style(None), plt.style.context("ggplot"):
    own = lit_mult.adam_vs_muon(points, differences)
own

# %% [markdown]
# And for slides, with larger type and thicker lines, at 16:9:

# %%
with lit_mult.figure_style("talk"):
    slide = lit_mult.loss_vs_lr(runs, points, words)
slide

# %%
scratch.cleanup()
