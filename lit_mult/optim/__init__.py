"""Parameter groups, the AdamW + Muon optimizer, gradient clipping and schedules."""
