"""One run: the LightningModule, the checkpoints, and its record."""
