"""One run: the LightningModule, the checkpoints, and the record it leaves."""
