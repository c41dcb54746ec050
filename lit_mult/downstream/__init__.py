"""Downstream tasks: our models as lm-eval's, and the scoring and generation behind that."""
