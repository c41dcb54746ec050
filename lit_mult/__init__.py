"""Learnable multipliers in language-model pretraining: train, sweep, compare and plot.

    import lit_mult

    config = lit_mult.RunConfig.from_dict({"multipliers": "vector", "model": {"d_model": 128}})
    record = lit_mult.run(config, "runs/a")                       # -> RunRecord
    lit_mult.run_stack([lit_mult.Member(config, "runs/b"), ...])  # runs of equal shapes, trained as one model

    lit_mult.sweep(lit_mult.load_study("quick"), "results/quick")
    runs = lit_mult.load_records("results/quick")                 # -> DataFrame, a row a run
    points = lit_mult.sensitivity_points(runs)                    # best loss, optimum and sensitivity of every curve
    figure = lit_mult.loss_vs_lr(runs, points, lit_mult.arm_labels(runs))  # -> matplotlib Figure
    with lit_mult.figure_style("talk"):                           # figures for slides, these and any others
        figure = lit_mult.loss_vs_lr(runs, points)
    lit_mult.write_report("results/quick")                        # tables, figures, report.md
    lit_mult.load_diagnostics("runs/a")                           # -> DataFrame, what train.diagnostics asked for

    trained = lit_mult.load_trained("runs/a")                     # -> model, tokenizer and corpus of a finished run
    plain = lit_mult.merged(trained.model)                        # -> a copy with W_eff in place of W, equal logits
    scores = lit_mult.load_scores("results/downstream", lit_mult.load_records("results/downstream"))

Multipliers on a model of any library, in a training script of its own (needs torch alone):

    lit_mult.add_multipliers(model, kind="vector")
    lit_mult.width_rules(model, base_model, optimizer="muon")     # muP: lr holds from the base width on
    optimizer = lit_mult.HybridOptimizer(lit_mult.build_param_groups(model, lr=3e-4, optimizer="muon"))
    lit_mult.clip_grad_norm_(model, 1.0)                          # after backward, in place of torch's
    lit_mult.merge_and_unload(model)                              # a plain model again, with the same outputs

Checks of such models:

    lit_mult.coord_check(make_model, [256, 512, 1024], batches).exponents  # does everything move alike at every width?
    lit_mult.lint_placement(model)                                # multipliers that can trade scale

Names load what they need when they are first used: reading records needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_mult.analysis.arms import arm_labels
    from lit_mult.analysis.diagnostics import load_diagnostics
    from lit_mult.analysis.frame import load_curves, load_records
    from lit_mult.analysis.latex import to_latex
    from lit_mult.analysis.plots import adam_vs_muon, loss_vs_lr, optimum_drift
    from lit_mult.analysis.report import write_report
    from lit_mult.analysis.scores import load_scores
    from lit_mult.analysis.sensitivity import interpolated_optimum, lr_sensitivity, paired_differences
    from lit_mult.analysis.sensitivity import optimum_drift as optimum_slopes
    from lit_mult.analysis.sensitivity import points as sensitivity_points
    from lit_mult.analysis.styles import figure_style
    from lit_mult.checks import coord_check, lint_placement
    from lit_mult.config import RunConfig
    from lit_mult.errors import ConfigError, UserError
    from lit_mult.inject.groups import build_param_groups, clip_grad_norm_
    from lit_mult.inject.hf_trainer import MultiplierTrainerCallback
    from lit_mult.inject.lightning import MultiplierCallback
    from lit_mult.inject.model import add_multipliers, merge_and_unload, remove_multipliers
    from lit_mult.inject.noise import NoiseTwin
    from lit_mult.inject.table import parameters
    from lit_mult.inject.widths import width_rules
    from lit_mult.nn.merging import merged
    from lit_mult.optim.hybrid import HybridOptimizer
    from lit_mult.schema import RunRecord
    from lit_mult.stacked.run import Member, run_stack
    from lit_mult.study.files import load_study
    from lit_mult.study.spec import StudySpec
    from lit_mult.study.sweep import sweep
    from lit_mult.training.run import run
    from lit_mult.training.trained import load_trained

_HOMES = {
    "ConfigError": "lit_mult.errors",
    "HybridOptimizer": "lit_mult.optim.hybrid",
    "Member": "lit_mult.stacked.run",
    "MultiplierCallback": "lit_mult.inject.lightning",
    "MultiplierTrainerCallback": "lit_mult.inject.hf_trainer",
    "NoiseTwin": "lit_mult.inject.noise",
    "RunConfig": "lit_mult.config",
    "RunRecord": "lit_mult.schema",
    "StudySpec": "lit_mult.study.spec",
    "UserError": "lit_mult.errors",
    "adam_vs_muon": "lit_mult.analysis.plots",
    "add_multipliers": "lit_mult.inject.model",
    "arm_labels": "lit_mult.analysis.arms",
    "build_param_groups": "lit_mult.inject.groups",
    "clip_grad_norm_": "lit_mult.inject.groups",
    "coord_check": "lit_mult.checks",
    "figure_style": "lit_mult.analysis.styles",
    "interpolated_optimum": "lit_mult.analysis.sensitivity",
    "lint_placement": "lit_mult.checks",
    "load_curves": "lit_mult.analysis.frame",
    "load_diagnostics": "lit_mult.analysis.diagnostics",
    "load_records": "lit_mult.analysis.frame",
    "load_scores": "lit_mult.analysis.scores",
    "load_study": "lit_mult.study.files",
    "load_trained": "lit_mult.training.trained",
    "loss_vs_lr": "lit_mult.analysis.plots",
    "lr_sensitivity": "lit_mult.analysis.sensitivity",
    "merge_and_unload": "lit_mult.inject.model",
    "merged": "lit_mult.nn.merging",
    "optimum_drift": "lit_mult.analysis.plots",
    "optimum_slopes": "lit_mult.analysis.sensitivity:optimum_drift",
    "paired_differences": "lit_mult.analysis.sensitivity",
    "parameters": "lit_mult.inject.table",
    "remove_multipliers": "lit_mult.inject.model",
    "run": "lit_mult.training.run",
    "run_stack": "lit_mult.stacked.run",
    "sensitivity_points": "lit_mult.analysis.sensitivity:points",
    "sweep": "lit_mult.study.sweep",
    "to_latex": "lit_mult.analysis.latex",
    "width_rules": "lit_mult.inject.widths",
    "write_report": "lit_mult.analysis.report",
}

__all__ = [
    "ConfigError",
    "HybridOptimizer",
    "Member",
    "MultiplierCallback",
    "MultiplierTrainerCallback",
    "NoiseTwin",
    "RunConfig",
    "RunRecord",
    "StudySpec",
    "UserError",
    "adam_vs_muon",
    "add_multipliers",
    "arm_labels",
    "build_param_groups",
    "clip_grad_norm_",
    "coord_check",
    "figure_style",
    "interpolated_optimum",
    "lint_placement",
    "load_curves",
    "load_diagnostics",
    "load_records",
    "load_scores",
    "load_study",
    "load_trained",
    "loss_vs_lr",
    "lr_sensitivity",
    "merge_and_unload",
    "merged",
    "optimum_drift",
    "optimum_slopes",
    "paired_differences",
    "parameters",
    "remove_multipliers",
    "run",
    "run_stack",
    "sensitivity_points",
    "sweep",
    "to_latex",
    "width_rules",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(home), attribute or name)
