"""The paper's experiments, and open questions of its authors: from records and diagnostics to figure and verdict.

Each experiment of `config.Experiment` is the module of its name, whose function `findings` takes the
`Evidence` of a study.
"""
