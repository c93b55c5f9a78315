"""What a grid of runs is, and running it."""
