"""A store's results, read for tables and figures."""
