"""A sweep as one page: figures, failures, all runs in a table with filters, and how they were made."""

from sparselab.page.report import PAGE, Renewed, write_report

__all__ = ["PAGE", "Renewed", "write_report"]
