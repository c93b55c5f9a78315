"""Where and in which order a grid's cells are computed: here, in several processes, or on Ray."""
