# %% [markdown]
# # Your first sweep, and how to read it
#
# ```bash
# lit-mult sweep quick            # or make quickstart: 72 small models, six minutes on two CPU cores
# ```
#
# leaves a study in `results/quick`: a record of every run, tables, figures and a report. A study compares *arms* (here
# muP's fixed multipliers against learnable row and column vectors) at several values of the *scientific factors*
# (optimizer, width), each with the *nuisance factors* (the learning rate) searched. This notebook loads the records of a
# finished study and explains its figures. It trains nothing and needs no torch.
#
# It reads `results/pays`: the question of the quick study over five other seeds, with muP's multipliers tuned as a third
# and fourth arm. Point `folder` at any other results folder to read that one.

# %%
# %matplotlib inline
from pathlib import Path

import lit_mult

folder = Path("../results/pays")
runs = lit_mult.load_records(folder)
runs[["arm", "optimizer", "d_model", "lr", "seed", "status", "initial_loss", "final_loss"]].head()

# %% [markdown]
# One row is one run. A run whose loss exploded has the status `diverged` and no final loss: it is a result, and it stays.
# Whatever is in the record is in the table, and each record holds the whole config, the git commit and the hash of the
# corpus, so that every number below can be traced and repeated.

# %%
runs.groupby(["arm", "optimizer"]).agg(
    runs=("lr", "size"), diverged=("status", lambda s: (s == "diverged").sum()), tokens=("tokens", "sum")
)

# %% [markdown]
# ## Loss against learning rate
#
# The first figure to look at. One panel a width and optimizer, one line an arm, the band a 95 % interval (Student's t)
# over seeds. Ask three things:
#
# 1. *Is the optimum inside the range?* An optimum at the edge is a warning, not a result. Stars mark it; a hollow star
#    lies at the edge.
# 2. *How flat is the curve around it?* That is what tuning costs: on a flat curve a wrong learning rate does little harm.
# 3. *How do the lowest points compare?* Only then which arm is better when both are tuned.
#
# In the shade runs end before matrices reach the balance of noise and decay: multipliers can do little there.

# %%
points = lit_mult.sensitivity_points(runs)
labels = lit_mult.arm_labels(runs)  # what the arms differ in, in words
lit_mult.loss_vs_lr(runs, points, labels)

# %% [markdown]
# ## Learning-rate sensitivity
#
# The flatness as one number ([arXiv:2309.14322](https://arxiv.org/abs/2309.14322), sec. 2.2): the mean over the learning
# rates of `min(loss, initial loss) - best loss`. It depends on the range of rates, so compare it over equal ranges and
# never without the curve. By hand, for one curve:

# %%
curve = runs.query("arm == 'vectors' and optimizer == 'adamw' and d_model == 32 and seed == 3 and not added")
curve = curve.sort_values("lr")
capped = curve["final_loss"].fillna(curve["initial_loss"]).clip(upper=curve["initial_loss"])
by_hand = (capped - capped.min()).mean()
from_the_package = lit_mult.lr_sensitivity(curve["lr"], curve["final_loss"], curve["initial_loss"].iloc[0])
assert abs(by_hand - from_the_package) < 1e-12
by_hand

# %%
points[~points["reference"]].pivot_table(
    index=["optimizer", "d_model"], columns="arm", values=["sensitivity", "best_loss"]
).round(4)

# %% [markdown]
# ## Differences, paired
#
# Both arms start from the same matrices and see the same batches in the same order, so runs of equal seed are compared
# with each other and the noise they share drops out. Below 0, the first named is better. An interval that holds 0 shows
# no difference, and one within ±0.01 that there is none to speak of. Each seed has one value, at a learning rate that is
# best for all seeds; the interval is Student's t on these.

# %%
differences = lit_mult.paired_differences(points)
arms = differences[(differences["between"] == "arm") & (differences["against"] == "muP")]
arms[["of", "against", "within", "d_model", "measure", "seeds", "difference", "low", "high", "doubtful"]].round(4)

# %% [markdown]
# ## Does the optimum stay where it is?
#
# The point of muP is that the best learning rate of a small model is the best of a large one. The slope of log2 (optimum)
# against log2 (width) says whether it did: 0, it transfers; -1, it falls as 1 / width.

# %%
drift = lit_mult.optimum_slopes(points)
drift[["label", "seeds", "slope", "slope_low", "slope_high", "trusted"]].round(3)

# %%
lit_mult.optimum_drift(points, drift)

# %% [markdown]
# ## And then
#
# - `lit-mult report results/NAME` writes all of this, with the warnings, into `results/NAME/report.md`, its tables as
#   CSV, Markdown and LaTeX, and its figures for papers, talks or posters (`--style`).
# - `lit_mult.load_curves(runs.query("arm == 'vectors'"))` gives the loss curves of chosen runs.
# - A study of your own is a YAML file: copy `sweeps/quick.yaml`, change the arms, and run `lit-mult sweep mine.yaml`; or
#   start from [your_own.ipynb](your_own.ipynb).
# - A figure of your own for a paper: [paper_figure.ipynb](paper_figure.ipynb).
