"""What a run measures besides its loss, and the references it is held against."""
