"""What a run measures besides its loss, and the references to compare with."""
