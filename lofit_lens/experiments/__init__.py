"""Experiments: grids of runs, each run stored in a folder, and their tables."""
