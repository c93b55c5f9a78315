"""One folder a run, named by the hash of its spec."""
