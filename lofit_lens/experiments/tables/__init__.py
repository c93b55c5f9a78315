"""Read a store's results for tables and figures."""
