"""Writes the tables of README.md and docs/ from results files: `python docs/readme.py`, or `make readme`.

Between `<!-- table: results.json ... -->` and `<!-- end -->` stand the Markdown tables of those files, which
`formix compare` or `formix bench targets` wrote, or of a directory that `formix convert --record` wrote;
`<!-- joint: results.json ... -->` joins the files of comparisons in one table, and `<!-- training: DIRECTORY ... -->`
makes one of what `formix train` left there (config.json and result.json), `<!-- overhead: FILE ... -->` one of what
scripts/train_overhead.py wrote. docs/results/conversion/README.md is made as a whole, of the records beside it.
`--check` only says whether the tables still are those of the files.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from formix import records
from formix.benchmarks.results import SCHEMA, Benchmark
from formix.benchmarks.tables import targets_markdown
from formix.comparison import joint_markdown, markdown_table, read_results
from formix.conversion.summary import page as conversion_page
from formix.conversion.summary import tables as conversion_tables

ROOT = Path(__file__).resolve().parent.parent
CONVERSIONS = ROOT / "docs" / "results" / "conversion"
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
TABLE = re.compile(r"(<!-- (table|joint|training|overhead): ([^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(match: re.Match[str]) -> str:
    """The tables of the files that a marker names."""
    begin, kind, files, end = match.groups()
    paths = [ROOT / file for file in files.split()]
    return f"{begin}\n{KINDS[kind](paths)}\n{end}"


def _tables(paths: list[Path]) -> str:
    return "\n".join(f"{_table(path).strip()}\n" for path in paths)


def _joint(paths: list[Path]) -> str:
    return joint_markdown([read_results(path) for path in paths])


def _table(path: Path) -> str:
    if path.is_dir():  # of records of conversions
        return conversion_tables(path)
    if json.loads(path.read_text()).get("schema") == SCHEMA:
        return targets_markdown(records.read(Benchmark, path, "formix bench"))
    results = read_results(path)
    task = results.task
    heading = f"`--data {task.data}`, {task.model}, {results.environment.cpu}, {results.environment.instruction_set}:"
    return f"{heading}\n\n{markdown_table(results)}"


def _training(directories: list[Path]) -> str:
    lines = [
        "| study | data | model | design | epochs | minutes | metric | validation | test | chance |",
        "| --- | --- | --- | --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for directory in directories:
        config, result = (json.loads((directory / name).read_text()) for name in ("config.json", "result.json"))
        cells = [directory.name, config["data"], config["model"], config["design"] or "the model's own"]
        cells += [f"{config['epochs']:g}", f"{result['seconds'] / 60:.0f}", result["metric"]]
        cells += [f"{result[name]:.4f}" for name in ("validation", "test", "chance")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _overhead(files: list[Path]) -> str:
    lines = ["| task | loop | speed | of the bare loop |", "| --- | --- | ---: | ---: |"]
    for file in files:
        result = json.loads(file.read_text())
        task = f"{result['task']} ({result['threads']} threads, {result['rounds']} rounds)"
        for name, speed in result["speed"].items():
            lines.append(f"| {task} | {name} | {speed:,.1f} {result['unit']} | {result['to bare'][name]:.3f} |")
    return "\n".join(lines) + "\n"


KINDS = {"table": _tables, "joint": _joint, "training": _training, "overhead": _overhead}


def main() -> int:
    changed = 0
    for page in PAGES:
        before = page.read_text()
        after = conversion_page(CONVERSIONS) if page == CONVERSIONS / "README.md" else TABLE.sub(tables, before)
        if before != after and "--check" not in sys.argv:
            page.write_text(after)
        changed |= before != after
    return int(changed and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
