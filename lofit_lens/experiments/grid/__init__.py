"""Grids of runs: their specification, their expansion into cells, and running them."""
