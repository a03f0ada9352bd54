"""`formix report`: the page and tables of finished comparisons."""

from __future__ import annotations

from pathlib import Path


def report(arguments: list[str]) -> int:
    """Make the report of comparisons again, or print their tables: --markdown each, --joint all in one."""
    from rich.console import Console

    from formix.comparison import joint_markdown, markdown_table, read_results, write_report

    paths = [a for a in arguments if not a.startswith("-")]
    options = [a for a in arguments if a.startswith("-")]
    out = next((a.removeprefix("--out=") for a in options if a.startswith("--out=")), "report.html")
    unknown = [a for a in options if a not in ("--markdown", "--joint") and not a.startswith("--out=")]
    if unknown or not paths:
        raise ValueError("usage: formix report DIR|RESULTS.json ... [--out=report.html] [--markdown | --joint].")
    files = [Path(path, "results.json") if Path(path).is_dir() else Path(path) for path in paths]
    results = [read_results(file) for file in files]
    if "--joint" in options:
        print(joint_markdown(results))
        return 0
    if "--markdown" in options:
        print("\n\n".join(markdown_table(result) for result in results))
        return 0
    write_report(results, out)
    Console(markup=False).print(f"Report: {out}", soft_wrap=True)
    return 0
