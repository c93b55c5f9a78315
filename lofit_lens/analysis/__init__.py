"""Analysis: data in, data out; plots are in `lofit_lens.plots`."""
