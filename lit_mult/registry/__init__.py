"""What can be chosen: one entry for each multiplier kind and optimizer, with what it supports. Needs no torch."""
