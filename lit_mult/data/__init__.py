"""From text to batches: corpora, tokenizers, the token cache, and windows as a function of (seed, step)."""
