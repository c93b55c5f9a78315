"""A study's figures, and its report: one HTML page that opens without Python and without a network."""

from lofit_lens.report.page import render, write_report

__all__ = ["render", "write_report"]
