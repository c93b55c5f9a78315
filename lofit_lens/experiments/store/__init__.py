"""A store of runs: one folder per run, named by the hash of its spec."""
