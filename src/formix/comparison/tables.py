"""The summary of a comparison as a table: in the terminal, in Markdown, and as the cells of the HTML report."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from formix.comparison.results import Results, Task, latency_settings
from formix.comparison.statistics import Difference, Summary, baseline_design, summarise

if TYPE_CHECKING:
    from rich.console import Console

METRICS = {
    "accuracy": "accuracy",
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "matthews_corrcoef": "Matthews correlation",
    "spearman": "Spearman correlation",
}
ITEMS = {
    "image-classification": "image",
    "causal-lm": "sequence",
    "masked-lm": "sequence",
    "sequence-classification": "sequence",
    "sequence-regression": "sequence",
}
NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the summary, a cell per design."""

    name: str  # "test", "difference", ... for the code that draws it
    header: str  # quantity
    group: str = ""  # neighbours with the same group stand under one heading in the report
    unit: str = ""  # unit or direction, shown under the header
    cells: Sequence[str]  # text
    keys: Sequence[float | None]  # what sorting compares; None goes last
    priority: int = 0  # narrow terminals leave out the highest first


def columns(results: Results, summaries: Sequence[Summary]) -> list[Column]:
    """All columns after the design's name that have at least one value."""
    task = results.task
    decimals = metric_decimals(summaries)
    baseline = baseline_design(results)
    arrow = "↑ higher is better" if task.higher_is_better else "↓ lower is better"
    item = ITEMS[task.kind]
    found = [
        Column(
            name="test",
            header=f"Test {METRICS[task.metric]}",
            unit=arrow,
            cells=[with_deviation(s.mean, s.deviation, decimals) for s in summaries],
            keys=[s.mean for s in summaries],
        ),
        Column(
            name="difference",
            header=f"Difference to {baseline}",
            unit="95 % interval",
            cells=[_difference(s, baseline, decimals) for s in summaries],
            keys=[None if s.difference is None else s.difference.mean for s in summaries],
            priority=1,
        ),
    ]
    for precision, batch in latency_settings(results):
        values = [s.latency_ms.get((precision, batch)) for s in summaries]
        priority = 3 if precision == "float32" else 9
        group = f"Latency, ms ({precision})"
        found.append(_numbers("latency", f"batch\N{NO-BREAK SPACE}{batch}", "", values, 1.0, priority, group))
    speeds = [s.train_items_per_second for s in summaries]
    found.append(_numbers("speed", "Training", f"{item}s/s", speeds, 1.0, 4))
    for name, header, unit, values, base, priority in (
        ("parameters", "Parameters", "", [s.parameters for s in summaries], 1000, 5),
        ("flops", "FLOPs", f"/{item}", [s.flops for s in summaries], 1000, 6),
        ("memory", "Peak memory", "B", [s.peak_memory_bytes for s in summaries], 1024, 7),
    ):
        power, prefix = si_prefix(values, base)
        found.append(_numbers(name, header, f"{prefix}{unit}", values, power, priority))
    found += [
        Column(
            name="lr",
            header="Learning rate",
            unit="chosen",
            cells=[NOTHING if s.lr is None else f"{s.lr:g}" for s in summaries],
            keys=[s.lr for s in summaries],
            priority=8,
        ),
        Column(
            name="seeds",
            header="Seeds",
            cells=[_seeds(s) for s in summaries],
            keys=[float(s.seeds) for s in summaries],
            priority=2,
        ),
    ]
    return [c for c in found if c.name == "test" or any(cell not in (NOTHING, "baseline") for cell in c.cells)]


def print_table(results: Results, console: Console) -> None:
    """Print the summary; a narrow terminal gets the columns that matter most."""
    from rich.table import Table
    from rich.text import Text

    summaries = summarise(results)
    shown = columns(results, summaries)
    names = max(len("Design"), *(len(summary.design) for summary in summaries))

    while len(shown) > 1 and names + 4 + sum(_narrowest(column) + 3 for column in shown) > console.width:
        shown.remove(max(shown, key=lambda column: column.priority))
    table = Table(title=Text(title(results.task), style="bold"), title_justify="left", header_style="bold")
    table.add_column("Design", no_wrap=True, vertical="bottom")
    for column in shown:
        lines = [column.group, column.header, column.unit]
        header = Text("\n".join(textwrap.fill(line, _narrowest(column)) for line in lines if line))
        table.add_column(header, justify="right", vertical="bottom", no_wrap=True)
    for row, summary in enumerate(summaries):
        table.add_row(Text(summary.design), *(Text(column.cells[row]) for column in shown))
    console.print(table)
    for line in footnotes(results):
        console.print(Text(line))


def markdown_table(results: Results) -> str:
    """The main columns of the summary in Markdown, followed by reference values and what could not run."""
    summaries = summarise(results)
    shown = [column for column in columns(results, summaries) if column.priority < 8]
    heads = ["Design", *(f"{c.group} {c.header}".strip() + (f" ({c.unit})" if c.unit else "") for c in shown)]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * len(shown) + "|"]
    for row, summary in enumerate(summaries):
        cells = [f"`{summary.design}`", *(column.cells[row] for column in shown)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, *(f"\n{line}" for line in footnotes(results))]) + "\n"


def footnotes(results: Results) -> list[str]:
    """Reference values, refusals and diverged runs, one sentence each."""
    lines = []
    references = reference_values(results.task)
    if references:
        values = ", ".join(f"{name} {value:.4g}" for name, value in references.items())
        lines.append(f"For reference, {METRICS[results.task.metric]} of {values}.")
    lines += [f"{record.design} did not run: {record.refused}" for record in results.designs if record.refused]
    lines += [
        f"{run.design} with seed {run.seed} diverged: {run.message}" for run in results.runs if run.status == "diverged"
    ]
    return lines


def title(task: Task) -> str:
    """The data and the kind of task in a few words."""
    return f"{task.data}: {task.kind.replace('-', ' ').replace('lm', 'language modelling')}"


def reference_values(task: Task) -> dict[str, float]:
    """Baselines by name, and chance."""
    return task.baselines | ({} if task.chance is None else {"chance": task.chance})


def metric_decimals(summaries: Sequence[Summary]) -> int:
    """Decimals that give the typical deviation two significant digits; 3 where there is no deviation."""
    known = sorted(s.deviation for s in summaries if s.deviation)
    return min(4, max(2, 1 - math.floor(math.log10(known[len(known) // 2])))) if known else 3


def with_deviation(mean: float | None, deviation: float | None, decimals: int) -> str:
    """`0.962 ± 0.004`."""
    if mean is None:
        return NOTHING
    return signed(mean, decimals, plus="") + (f" ± {deviation:.{decimals}f}" if deviation is not None else "")


def interval(difference: Difference, decimals: int) -> str:
    """`+0.004 [−0.006, +0.014]`."""
    text = signed(difference.mean, decimals)
    if difference.low is None or difference.high is None:
        return f"{text} ({'one seed' if difference.seeds == 1 else 'the same in all seeds'}, no interval)"
    return f"{text} [{signed(difference.low, decimals)}, {signed(difference.high, decimals)}]"


def signed(value: float, decimals: int, plus: str = "+") -> str:
    """A number with its sign, a true minus."""
    text = f"{abs(value):.{decimals}f}"
    return ("−" if value < 0 else plus) + text if float(text) else text


def significant(value: float, digits: int = 3) -> str:
    """A positive number with so many significant digits and no exponent: 0.0123, 4.57, 31.2, 1250."""
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, decimals):.{max(decimals, 0)}f}"


def si_prefix(values: Sequence[float | None], base: int) -> tuple[float, str]:
    """The power and the prefix in which the largest value lies between 1 and `base`."""
    largest = max((value for value in values if value is not None), default=0.0)
    prefixes = ["", "k", "M", "G", "T", "P"] if base == 1000 else ["", "Ki", "Mi", "Gi", "Ti"]
    step = min(len(prefixes) - 1, int(math.log(largest, base))) if largest >= 1 else 0
    return float(base**step), prefixes[step]


def _numbers(
    name: str, header: str, unit: str, values: Sequence[float | None], power: float, priority: int, group: str = ""
) -> Column:
    cells = [NOTHING if value is None else significant(value / power) for value in values]
    return Column(name=name, header=header, group=group, unit=unit, cells=cells, keys=values, priority=priority)


def _narrowest(column: Column) -> int:
    """The width at which no cell and no word of the header breaks."""
    words = f"{column.group} {column.header} {column.unit}".split()
    return max(map(len, [*words, *column.cells]))


def _difference(summary: Summary, baseline: str | None, decimals: int) -> str:
    if summary.design == baseline:
        return "baseline"
    return NOTHING if summary.difference is None else interval(summary.difference, decimals)


def _seeds(summary: Summary) -> str:
    if summary.diverged:
        return f"{summary.seeds} of {summary.seeds + summary.diverged}"
    return str(summary.seeds) if summary.seeds else NOTHING
