"""Downstream evaluation: benchmarks through lm-eval, on live models."""
