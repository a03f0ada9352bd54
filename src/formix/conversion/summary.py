"""Records of conversions in one directory, and the table over them: what docs/results/conversion holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from formix.benchmarks.results import Benchmark
from formix.benchmarks.tables import HEADS, markdown_table, rows
from formix.conversion.record import Conversion
from formix.environment import capture_environment
from formix.records import plain, read, write_atomically

HEAD = "| study | design | measure | source | converted | calibrated | recovered | change | recovery |"


def write_record(conversion: Conversion, directory: Path, study: str, design: str) -> None:
    """Keep a record, without what only the model's own directory needs, and make the directory's README.md anew."""
    record = conversion.to_dict()
    for name in ("mapping", "folded", "request"):
        del record[name]
    record["source"] = {k: v for k, v in record["source"].items() if k != "config"}
    record["plan"] = {k: v for k, v in record["plan"].items() if k != "kept"}
    record |= {"study": study, "design": design, "environment": plain(capture_environment())}
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{study}-{''.join(c if c.isalnum() or c in '+-' else '_' for c in design)}.json"
    write_atomically(file, json.dumps(record, indent=1, default=str) + "\n")
    refresh_summary(directory)


def refresh_summary(directory: Path) -> None:
    """Make the directory's README.md anew if it holds records of conversions."""
    if _records(directory):
        write_atomically(directory / "README.md", page(directory))


def page(directory: Path) -> str:
    """README.md of a directory of records."""
    return f"# Pretrained models, in other designs\n\n{tables(directory)}"


def tables(directory: Path) -> str:
    """The table over all records in a directory, and that of the speeds in its subdirectories."""
    lines = [HEAD, "|---" * 2 + "|---" + "|---:" * 6 + "|"]
    for record in _records(directory):
        lines += _rows(record)
    lines += [
        "",
        "converted: weights carried over, nothing fitted; calibrated: one gain per head in closed form;",
        "recovered: after the last stage of distillation.",
        "`formix convert STUDY.yaml --record=DIR` writes a record and this table; `make readme` makes that of formix's",
        "own records anew.",
    ]
    speeds = [read(Benchmark, path, "formix bench") for path in sorted(directory.glob("*/results.json"))]
    if speeds:
        cases = [row for benchmark in speeds for row in rows(benchmark.cases)]
        lines += [
            "",
            "Inference against the source's own class of timm or transformers, called in turn in one process",
            f"({speeds[-1].environment.cpu}, {speeds[-1].isa}, {speeds[-1].environment.threads} threads;",
            "`formix bench converted --directories=... --out=DIR/NAME`):",
            "",
            markdown_table([HEADS, *cases]).rstrip(),
        ]
    return "\n".join(lines) + "\n"


def _records(directory: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    return [record for record in found if isinstance(record, dict) and {"study", "metrics"} <= record.keys()]


def _rows(record: dict[str, Any]) -> list[str]:
    metrics = record["metrics"]
    if not metrics:
        return []
    stages = [s for s in record["stages"] if s.get("trained")]
    seconds = sum(s["seconds"] for s in stages)
    last: dict[str, float] = next((metrics[s["stage"]] for s in reversed(stages) if s["stage"] in metrics), {})
    lines = []
    for name, source in metrics["source"].items():
        cells = [metrics.get(step, {}).get(name) for step in ("converted", "calibrated")] + [last.get(name)]
        change = "" if cells[-1] is None else f"{cells[-1] - source:+.4f}"
        values = " | ".join("" if v is None else f"{v:.4f}" for v in (source, *cells))
        lines.append(f"| {record['study']} | {record['design']} | {name} | {values} | {change} | {seconds:.0f} s |")
    return lines
