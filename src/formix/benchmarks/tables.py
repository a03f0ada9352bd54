"""Benchmarks as tables, in the terminal and in Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from formix.benchmarks.results import Benchmark, Case, Check
from formix.benchmarks.targets import TARGETS

if TYPE_CHECKING:
    from rich.table import Table

HEADS = ("case", "contender", "ms", "times faster than softmax", "GFLOP/s", "share of matmul", "memory, MiB")
NOTHING = "–"


def rows(cases: Iterable[Case]) -> list[tuple[str, ...]]:
    """A row for every contender; the columns are `HEADS`."""
    found: list[tuple[str, ...]] = []
    for case in cases:
        for name, timing in case.timings.items():
            share = case.share(name)
            found.append(
                (
                    case.name,
                    name,
                    milliseconds(timing.median),
                    f"{case.ratio(name, 'softmax'):.2f}" if "softmax" in case.timings else NOTHING,
                    NOTHING if timing.gflops is None else f"{timing.gflops:.0f}",
                    NOTHING if share is None else f"{share:.0%}",
                    NOTHING if timing.memory is None else f"{timing.memory / 2**20:.0f}",
                )
            )
    return found


def milliseconds(seconds: float) -> str:
    """Three significant digits, or whole milliseconds."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def terminal_tables(benchmark: Benchmark) -> list[Table]:
    """One table of every case, its profile, and the targets."""
    from rich.table import Table

    tables = []
    for case in benchmark.cases:
        table = Table(title=case.name, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for i, head in enumerate(HEADS[1:]):
            table.add_column(head, justify="left" if i == 0 else "right")
        for row in rows([case]):
            table.add_row(*row[1:])
        tables.append(table)
        if case.profile:
            tables.append(_table(profile_rows(case), "where the time goes, ms"))
    if benchmark.checks:
        tables.append(_table([TARGET_HEADS, *target_rows(benchmark.checks)], "targets"))
    return tables


def profile_rows(case: Case) -> list[tuple[str, ...]]:
    """A head and a row for every part: its milliseconds in each contender."""
    parts = list(dict.fromkeys(part for seconds in case.profile.values() for part in seconds))
    return [
        ("part", *case.profile),
        *((part, *(milliseconds(times.get(part, 0.0)) for times in case.profile.values())) for part in parts),
    ]


TARGET_HEADS = ("target", "measured", "bound", "kept", "worst", "where")


def target_rows(checks: Sequence[Check]) -> list[tuple[str, ...]]:
    """Checks of the same quantity and bound in one row: how many keep the bound, and the worst of them."""
    groups: dict[tuple[int, str, float], list[Check]] = defaultdict(list)
    for check in checks:
        groups[check.target, check.quantity, check.bound].append(check)
    found: list[tuple[str, ...]] = []
    last = 0
    for (target, quantity, bound), members in groups.items():
        worst = min(members, key=lambda check: check.margin)
        kept = sum(check.met for check in members)
        found.append(
            (
                f"{target}. {TARGETS[target]}" if target != last else "",
                quantity,
                f"{'at most' if worst.at_most else 'at least'} {bound:g}",
                f"{'yes' if kept == len(members) else 'no'}, {kept} of {len(members)}",
                f"{worst.value:.2f}",
                worst.where,
            )
        )
        last = target
    return found


def comparison_rows(before: Benchmark, after: Benchmark) -> list[tuple[str, ...]]:
    """A head and a row for every contender that both have: times, and times faster than softmax in each.

    Raises:
        ValueError: they share no case.
    """
    old = {case.name: case for case in before.cases}
    found: list[tuple[str, ...]] = []
    for case in after.cases:
        other = old.get(case.name)
        if other is None:
            continue
        for name, timing in case.timings.items():
            if name not in other.timings:
                continue
            then = other.timings[name]
            both = [c.ratio(name, "softmax") if "softmax" in c.timings else None for c in (other, case)]
            found.append(
                (
                    case.name,
                    name,
                    milliseconds(then.median),
                    milliseconds(timing.median),
                    f"{then.median / timing.median:.2f}",
                    *(NOTHING if ratio is None else f"{ratio:.2f}" for ratio in both),
                )
            )
    if not found:
        raise ValueError("the two benchmarks have no case in common, so there is nothing to compare.")
    return [("case", "contender", "ms before", "ms now", "times faster", "against softmax before", "now"), *found]


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """Rows, the first of them the head, as a Markdown table; what looks like a number stands on the right."""
    head, *body = table
    right = [all(row[i][:1].isdigit() or row[i] == NOTHING for row in body) for i in range(len(head))]
    lines = [head, ["---:" if number else "---" for number in right], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def targets_markdown(benchmark: Benchmark) -> str:
    """The targets of a benchmark, under a line that says where it was measured."""
    where = benchmark.environment
    line = (
        f"{where.cpu} ({where.instruction_set}), {where.threads} threads, PyTorch {where.torch}, kernels for "
        f"{benchmark.isa}:"
    )
    return f"{line}\n\n{markdown_table([TARGET_HEADS, *target_rows(benchmark.checks)])}"


def page(benchmark: Benchmark) -> str:
    """The whole benchmark as a Markdown page."""
    parts = [
        "# CPU kernels, measured\n\nWritten by `formix bench`; do not edit. Times are medians; every contender of a "
        "case was called in turn with the others in one process. softmax is PyTorch's scaled_dot_product_attention "
        "(in models, the whole softmax model); naive is the operator as usually written in PyTorch, for SimA its "
        "official code; compiled is torch.compile of it, for SimA of the fused identity; matmul is PyTorch's product "
        "of two square matrices with the operations of the attention, of side 2048 at least. All get the same views "
        "of one packed qkv projection.\n",
    ]
    if benchmark.checks:
        parts.append(f"## Targets\n\n{targets_markdown(benchmark)}")
    for bench, cases in groupby(benchmark.cases, key=lambda case: case.bench):
        listed = list(cases)
        parts.append(f"## {bench.capitalize()}\n\n{markdown_table([HEADS, *rows(listed)])}")
        parts += [
            f"Where the time of {case.name} goes, in milliseconds under the profiler:\n\n"
            f"{markdown_table(profile_rows(case))}"
            for case in listed
            if case.profile
        ]
    return "\n".join(parts)


def _table(table: Sequence[Sequence[str]], title: str) -> Table:
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    head, *body = table
    for name in head:
        made.add_column(name)
    for row in body:
        made.add_row(*row)
    return made


def comparison_table(before: Benchmark, after: Benchmark) -> Table:
    """`comparison_rows` for the terminal."""
    return _table(comparison_rows(before, after), f"against the benchmark of {before.created}")
