"""`formix compare`: designs side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from formix.commands.arguments import parse, split_named

if TYPE_CHECKING:
    from formix.comparison import CompareConfig, Progress


def compare(arguments: list[str]) -> int:
    """Train designs side by side on the same data, budget and seeds."""
    from rich.console import Console

    from formix.comparison import compare as run
    from formix.comparison import print_table, write_report

    configs = _configs(arguments)
    console = Console(markup=False)  # brackets in a path are no style
    results = []
    for config in configs:
        console.print(f"{config.data}: {', '.join(config.design_names)}", style="bold")
        with _display() as show:
            result = run(config, show)
        results.append(result)
        report = Path(config.out) / "report.html"
        write_report(result, report)
        print_table(result, console)
        console.print(f"Report: {report}", soft_wrap=True)
    if len(results) > 1:
        joint = Path(os.path.commonpath([os.path.abspath(config.out) for config in configs])) / "report.html"
        write_report(results, joint)
        console.print(f"Report of all: {joint}", soft_wrap=True)
    return 0


def _configs(arguments: list[str]) -> list[CompareConfig]:
    """One configuration per study file, or one of the flags alone; flags override the files."""
    from formix.comparison import CompareConfig

    studies, flags = split_named(arguments, CompareConfig)
    if not studies:
        return [parse(CompareConfig, "compare", flags)]
    configs = []
    for study in studies:
        if not study.endswith((".yaml", ".yml")) or not Path(study).is_file():
            raise ValueError(f"{study} is no file; give a study's YAML.")
        config = parse(CompareConfig, "compare", ["--config", study, *flags])
        default = CompareConfig.__dataclass_fields__["out"].default
        if config.out == default:
            config = dataclasses.replace(config, out=f"runs/{Path(study).stem}")
        elif len(studies) > 1:
            config = dataclasses.replace(config, out=f"{config.out}/{Path(study).stem}")
        configs.append(config)
    if len({config.out for config in configs}) < len(configs):
        raise ValueError("Two studies would write to the same directory; give their files different names.")
    return configs


@contextlib.contextmanager
def _display() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("starting", total=None)

    def show(progress: Progress) -> None:
        bar.start()  # only now: before the first run a wrong argument may still end everything in one sentence
        done = progress.run - 1 + progress.share
        bar.update(task, description=progress.label, total=progress.runs, completed=round(done, 2))

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
