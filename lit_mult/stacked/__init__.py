"""Runs of equal shapes trained as one model: everything that only a stack needs."""
