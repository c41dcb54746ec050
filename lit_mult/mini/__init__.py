"""`mini`: a benchmark of seven tasks in the split of arXiv:2601.04890 table 2, and the training text that goes with it.

Both come out of the same generators, and which side an item is on is a matter of its content alone, so they share none.
Pure Python: the data layer draws training text from here, and lm-eval reads the task files that are written here.
"""

VERSION = 1
"""Raise it whenever the same call would give other items or other training text."""
