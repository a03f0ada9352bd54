"""The report of a comparison: one HTML file that needs no network, and what it says in words.

The page is templates/report.html.j2 with report.css and report.js beside it. It carries plotly.js (compressed; the
browser unpacks it) and the numbers as JSON; a content security policy in the page forbids every request.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from formix.comparison.results import Results, latency_settings
from formix.comparison.statistics import (
    Summary,
    baseline_design,
    learning_curve,
    learning_rates,
    summarise,
)
from formix.comparison.tables import (
    ITEMS,
    METRICS,
    columns,
    interval,
    metric_decimals,
    reference_values,
    signed,
    significant,
    title,
    with_deviation,
)
from formix.records import write_atomically


def write_report(results: Results | Sequence[Results], path: str | os.PathLike[str]) -> None:
    """Write the report of one comparison, or of several tasks on one page, to an HTML file."""
    from jinja2 import Environment, PackageLoader
    from plotly.offline import get_plotlyjs

    tasks = [results] if isinstance(results, Results) else list(results)
    if not tasks:
        raise ValueError("write_report was given no results, expected at least one")
    environment = Environment(
        loader=PackageLoader("formix.comparison"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"significant": significant, "pretty": _pretty}
    designs = list(dict.fromkeys(record.design for task in tasks for record in task.designs))
    sections = [_section(task, f"task{index}", designs) for index, task in enumerate(tasks, start=1)]
    page = environment.get_template("report.html.j2").render(
        sections=sections,
        heading=sections[0]["title"] if len(tasks) == 1 else f"{len(designs)} designs, {len(tasks)} tasks",
        marks={name: mark(index) for index, name in enumerate(designs)},
        charts=[section["charts"] for section in sections],
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode(),
    )
    write_atomically(path, page)


def mark(index: int) -> dict[str, int]:
    """Colour and marker shape of the design at `index`; the pair is unique among the first 64."""
    return {"colour": index % 8, "shape": (index + index // 8) % 8}


def finding(results: Results, summaries: Sequence[Summary] | None = None) -> str:
    """What the comparison shows, in one sentence computed from the numbers."""
    summaries = summarise(results) if summaries is None else summaries
    sign = 1.0 if results.task.higher_is_better else -1.0
    ranked = sorted((s for s in summaries if s.mean is not None), key=lambda s: -sign * (s.mean or 0.0))
    if not ranked:
        return "No design finished a run on this task."
    best, baseline, decimals = ranked[0], baseline_design(results), metric_decimals(summaries)
    value = with_deviation(best.mean, best.deviation, decimals)
    seeds = "1 seed" if best.seeds == 1 else f"{best.seeds} seeds"
    extreme = "highest" if sign > 0 else "lowest"
    sentence = f"{best.design} has the {extreme} mean test {METRICS[results.task.metric]}, {value} over {seeds}"
    if len(ranked) == 1:
        return f"{sentence}; no other design finished a run to compare it with."
    if best.design != baseline and best.difference is not None:
        difference = best.difference
        if difference.includes_zero is None:
            gap = signed(difference.mean, decimals)
            why = "one seed" if difference.seeds == 1 else "one and the same value in all seeds"
            return f"{sentence}; {why} gives no interval for its difference to {baseline} ({gap})."
        text = f"{sentence}; its difference to {baseline}, {interval(difference, decimals)}, "
        if difference.includes_zero:
            return (
                text + "has a 95\N{NO-BREAK SPACE}% interval that includes 0, so these seeds do not separate the two."
            )
        return text + "has a 95\N{NO-BREAK SPACE}% interval that excludes 0."
    others = [s for s in ranked[1:] if s.difference is not None]
    unclear = _names([s.design for s in others if s.difference and s.difference.includes_zero])
    worse = _names([s.design for s in others if s.difference and s.difference.includes_zero is False])
    if not unclear and not worse:
        why = "one seed" if best.seeds == 1 else "one and the same difference in all seeds"
        return f"{sentence}; {why} gives no intervals, so the order of the designs is uncertain."
    clauses = []
    if worse:
        clauses.append(f"excludes 0 for {worse}")
    if unclear:
        clauses.append(f"includes 0 for {unclear}, which these seeds do not separate from it")
    return f"{sentence}; the 95\N{NO-BREAK SPACE}% interval of the difference to it {' and '.join(clauses)}."


def _section(results: Results, identifier: str, designs: Sequence[str]) -> dict[str, Any]:
    """Everything the template shows of one task."""
    task, summaries = results.task, summarise(results)
    ranked = [s.mean for s in summaries if s.mean is not None]
    tries = learning_rates(results)
    shown = columns(results, summaries)
    return {
        "id": identifier,
        "title": title(task),
        "finding": finding(results, summaries),
        "results": results,
        "metric": METRICS[task.metric],
        "item": ITEMS[task.kind],
        "baseline": baseline_design(results),
        "references": reference_values(task),
        "summaries": summaries,
        "best": (max if task.higher_is_better else min)(ranked, default=None),
        "columns": shown,
        "groups": [(group, len(list(members))) for group, members in groupby(shown, key=lambda column: column.group)],
        "forest": _forest(summaries),
        "settings": latency_settings(results),
        "refused": [record for record in results.designs if record.refused is not None],
        "diverged": [run for run in results.runs if run.status == "diverged"],
        "notes": sorted({note for run in results.runs for note in run.notes}),
        "tries": tries,
        "rates": sorted({one.lr for row in tries.values() for one in row}),
        "decimals": metric_decimals(summaries),
        "with_deviation": with_deviation,
        "seeds": sorted({run.seed for run in results.runs}),
        "charts": _charts(results, summaries, identifier, designs),
    }


def _charts(results: Results, summaries: Sequence[Summary], identifier: str, designs: Sequence[str]) -> dict[str, Any]:
    """The numbers report.js draws."""
    task = results.task
    drawn = []
    for summary in summaries:
        runs = [run for run in results.runs if run.design == summary.design and run.selected]
        band = learning_curve(runs)
        drawn.append(
            {
                "name": summary.design,
                **mark(designs.index(summary.design)),
                "mean": summary.mean,
                "deviation": summary.deviation,
                "seeds": summary.seeds,
                "latency": {"/".join(setting): value for setting, value in summary.latency_ms.items()},
                "pareto": sorted("/".join(setting) for setting in summary.pareto),
                "curve": None if band is None else asdict(band),
            }
        )
    return {
        "id": identifier,
        "metric": METRICS[task.metric],
        "higher": task.higher_is_better,
        "decimals": metric_decimals(summaries),
        "references": reference_values(task),
        "designs": drawn,
    }


def _forest(summaries: Sequence[Summary]) -> dict[str, dict[str, float]]:
    """Differences and intervals as positions from 0 to 100 with the zero at 50, one scale for all designs."""
    differences = {s.design: s.difference for s in summaries if s.difference is not None}
    ends = [abs(v) for d in differences.values() for v in (d.mean, d.low, d.high) if v is not None]
    extent = max(ends, default=0.0) or 1.0

    def at(value: float) -> float:
        return round(50 + 47 * value / extent, 2)

    return {
        name: {
            "mean": at(d.mean),
            "low": at(d.mean if d.low is None else d.low),
            "high": at(d.mean if d.high is None else d.high),
        }
        for name, d in differences.items()
    }


def _names(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
