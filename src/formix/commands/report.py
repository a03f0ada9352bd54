"""`formix report`: the page and tables of finished comparisons."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import field
from pathlib import Path

from formix.commands.arguments import parse, split_named


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The page of finished comparisons, or their tables as Markdown."""

    results: list[str] = field(default_factory=list)  # directories of comparisons, or their results.json
    out: str = "report.html"  # the page, an .html file
    markdown: bool = False  # print the table of each in place of the page
    joint: bool = False  # print one table of all in place of the page

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("results are missing; give directories of comparisons, or their results.json.")
        if self.markdown and self.joint:
            raise ValueError("markdown and joint are both asked for; the tables of each are printed, or one of all.")
        if Path(self.out).suffix != ".html":
            raise ValueError(f"out is {self.out!r}; it must end in .html.")


def report(arguments: list[str]) -> int:
    """Make the report of comparisons again, or print their tables: --markdown each, --joint all in one."""
    from rich.console import Console

    from formix.comparison import joint_markdown, markdown_table, read_results, write_report

    named, flags = split_named(arguments, ReportConfig)
    if named:
        flags.append(f"--results={json.dumps(named)}")
    config = parse(ReportConfig, "report", flags)
    files = [Path(path, "results.json") if Path(path).is_dir() else Path(path) for path in config.results]
    results = [read_results(file) for file in files]
    if config.joint:
        print(joint_markdown(results))
    elif config.markdown:
        print("\n\n".join(markdown_table(result) for result in results))
    else:
        write_report(results, config.out)
        Console(markup=False).print(f"Report: {config.out}", soft_wrap=True)
    return 0
