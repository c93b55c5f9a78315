"""Executors: the order in which a grid's cells are computed, and where: here, in several processes, or on Ray."""
