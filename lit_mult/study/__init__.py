"""Many runs: study files, their cells, the Optuna storage and the workers."""
