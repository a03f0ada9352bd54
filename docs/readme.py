"""Writes the tables of README.md from results files: `python docs/readme.py`, or `make readme`.

Between `<!-- table: results.json ... -->` and `<!-- end -->` stand the Markdown tables of those files, which
`formix compare` or `formix bench targets` wrote; `--check` only says whether they still do.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from formix import records
from formix.benchmarks.results import SCHEMA, Benchmark
from formix.benchmarks.tables import targets_markdown
from formix.comparison import markdown_table, read_results

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(match: re.Match[str]) -> str:
    """The tables of the files that a marker names."""
    begin, files, end = match.groups()
    parts = [f"{_table(ROOT / file).strip()}\n" for file in files.split()]
    return f"{begin}\n" + "\n".join(parts) + f"\n{end}"


def _table(path: Path) -> str:
    if json.loads(path.read_text()).get("schema") == SCHEMA:
        return targets_markdown(records.read(Benchmark, path, "formix bench"))
    results = read_results(path)
    task = results.task
    heading = f"`--data {task.data}`, {task.model}, {results.environment.cpu}, {results.environment.instruction_set}:"
    return f"{heading}\n\n{markdown_table(results)}"


def main() -> int:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = TABLE.sub(tables, before)
    if "--check" in sys.argv:
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
