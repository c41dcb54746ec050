"""Stacks: runs of equal shapes trained as one model."""
