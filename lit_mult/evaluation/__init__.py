"""What a trained model can do: benchmarks through lm-eval, on live models."""
