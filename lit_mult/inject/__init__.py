"""Learnable multipliers on anybody's model. Needs torch alone."""
