"""The paper's experiments, and open questions of its authors: from records and diagnostics to figure and verdict."""
