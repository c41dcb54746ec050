"""The paper's experiments, and open questions of its authors: from records and diagnostics to figure and verdict.

A module is an experiment (`config.Experiment` lists what is here): its function `findings` takes the `Evidence` of a
study that names it and returns `Findings`.
"""
