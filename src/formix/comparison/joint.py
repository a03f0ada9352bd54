"""Comparisons on several tasks in one table."""

from __future__ import annotations

from collections.abc import Sequence

from formix.comparison.results import Results
from formix.comparison.statistics import Summary, baseline_design, summarise
from formix.comparison.tables import METRICS, NOTHING, footnotes, interval, metric_decimals, with_deviation


def joint_markdown(several: Sequence[Results]) -> str:
    """A Markdown table, a row per design and a column per task: the test metric and the difference to the baseline.

    Mean and sample deviation over seeds; the mean of the paired differences with its 95 % Student-t interval.
    """
    names = [results.task.data.rpartition("/")[2] for results in several]
    designs = list(dict.fromkeys(record.design for results in several for record in results.designs))
    rows = {design: [f"`{design}`"] for design in designs}
    baselines, seeds = set(), set()
    for results in several:
        summaries = summarise(results)
        decimals, found = metric_decimals(summaries), {summary.design: summary for summary in summaries}
        for design in designs:
            rows[design].append(_cell(found.get(design), decimals))
        baselines.add(baseline_design(results))
        seeds |= {summary.seeds for summary in summaries if summary.seeds}
    heads = [
        f"{name}, {METRICS[results.task.metric]} {'↑' if results.task.higher_is_better else '↓'}"
        for name, results in zip(names, several, strict=True)
    ]
    counts = " or ".join(map(str, sorted(seeds))) + (" seed" if seeds == {1} else " seeds")
    against = " or ".join(sorted(filter(None, baselines)))
    read = f"mean ± deviation over {counts}; below, the paired difference to {against} and its 95 % interval."
    notes = [
        *([f"Test split: {read}"] if seeds else []),  # unless no run finished
        *(f"{name}: {line}" for name, results in zip(names, several, strict=True) for line in footnotes(results)),
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (["Design", *heads], *rows.values())]
    return "\n".join([lines[0], "|---" + "|---:" * len(several) + "|", *lines[1:], *(f"\n{n}" for n in notes)]) + "\n"


def _cell(summary: Summary | None, decimals: int) -> str:
    if summary is None or summary.mean is None:
        return NOTHING
    value = with_deviation(summary.mean, summary.deviation, decimals)
    return value if summary.difference is None else f"{value}<br>{interval(summary.difference, decimals)}"
