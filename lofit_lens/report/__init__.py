"""One self-contained interactive HTML page: plain data in, a page that opens without Python and without a network out."""

from lofit_lens.report.page import render, write_report

__all__ = ["render", "write_report"]
