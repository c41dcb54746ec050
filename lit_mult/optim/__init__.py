"""Parameter groups, the AdamW + Muon optimizer and gradient clipping."""
