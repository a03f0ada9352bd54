"""The main job: designs trained side by side on the same data, budget and seeds, and a report of what came out."""

from formix.comparison.config import CompareConfig
from formix.comparison.joint import joint_markdown
from formix.comparison.report import write_report
from formix.comparison.results import Results, read_results, write_results
from formix.comparison.runner import Progress, compare
from formix.comparison.tables import markdown_table, print_table

__all__ = [
    "CompareConfig",
    "Progress",
    "Results",
    "compare",
    "joint_markdown",
    "markdown_table",
    "print_table",
    "read_results",
    "write_report",
    "write_results",
]
