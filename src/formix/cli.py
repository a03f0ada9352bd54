"""The command line: one verb, one function.

Verbs take flags and YAML files made from the same dataclasses; what is wrong with them is said in one sentence on
standard error, with exit status 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from formix.comparison import CompareConfig, Progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("usage: formix VERB ...\n\n" + "\n".join(f"  {n:10} {_summary(f)}" for n, f in VERBS.items()))
        print("\nformix VERB --help lists the flags of a verb.")
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        return _fail(f"{verb!r} is no verb of formix; it has {', '.join(VERBS)}.")
    try:
        return VERBS[verb](rest)
    except ValueError as error:
        return _fail(" ".join(str(error).split()))
    except OSError as error:
        return _fail(f"{error.filename or 'A file'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        print("formix: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130


def compare(arguments: list[str]) -> int:
    """Train designs side by side on the same data, budget and seeds."""
    from rich.console import Console

    from formix.comparison import compare as run
    from formix.comparison import print_table, write_report

    studies = [a for a in arguments if not a.startswith("-") and a.endswith((".yaml", ".yml"))]
    flags = [a for a in arguments if a not in studies]
    configs = _compare_configs(studies, flags)
    console = Console(stderr=False)
    results = []
    for config in configs:
        console.print(f"[bold]{config.data}[/bold]: {', '.join(config.design_names)}")
        with _progress_display() as show:
            result = run(config, show)
        results.append(result)
        report = Path(config.out) / "report.html"
        write_report(result, report)
        print_table(result, console)
        console.print(f"Report: {report}", soft_wrap=True)
    if len(results) > 1:
        joint = Path(os.path.commonpath([config.out for config in configs])) / "report.html"
        write_report(results, joint)
        console.print(f"Report of all: {joint}", soft_wrap=True)
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """Spread of token embeddings and share of attention, layer by layer."""

    model: str  # a directory of formix's or of transformers (BERT, RoBERTa, GPT-2, Llama)
    data: str  # a name of `formix data`; its test split is read
    batches: int = 4  # how many batches
    batch_size: int = 32  # samples in each
    sequence_length: int = 128  # tokens of a window or sentence
    tokenizer: str | None = None  # a transformers tokenizer directory
    json: bool = False  # print JSON instead of a table


def analyze(arguments: list[str]) -> int:
    """Print the spread of token embeddings and the share of attention, layer by layer."""
    from torch.utils.data import DataLoader
    from transformers import AutoModel

    from formix import load
    from formix.analysis import analyze as run
    from formix.data import collate, load_data
    from formix.models.directory import read_config

    config = _parse(AnalyzeConfig, "analyze", arguments)
    if config.batches < 1 or config.batch_size < 1:
        raise ValueError(f"batches is {config.batches} and batch_size {config.batch_size}; both must be 1 or more.")
    stored = read_config(Path(config.model))
    plain = "model_type" in stored and not str(stored["model_type"]).startswith("formix_")
    model = AutoModel.from_pretrained(config.model, local_files_only=True).eval() if plain else load(config.model)
    data = load_data(config.data, sequence_length=config.sequence_length, tokenizer=config.tokenizer)
    loader = DataLoader(data.test, batch_size=config.batch_size, collate_fn=collate)
    result = run(model, loader, max_batches=config.batches)
    print(result.to_json() if config.json else result)
    return 0


def designs(arguments: list[str]) -> int:
    """List the designs, each with its formula."""
    from rich.console import Console
    from rich.table import Table

    from formix.design import design, list_designs

    if arguments:
        for name in arguments:
            chosen = design(name)
            print(f"{name}: {chosen.describe()}\n{chosen.to_json()}")
        return 0
    table = Table("design", "what it is", "formula", box=None, padding=(0, 2, 0, 0))
    for name, line in list_designs().items():
        table.add_row(name, line, design(name).describe())
    console = Console()
    console.print(table)
    console.print("Combine with '+' (relu+paf+skip); options in parentheses: 'relu(length_exponent=0.5)'.")
    return 0


def report(arguments: list[str]) -> int:
    """Make the report of results.json files again, or with --markdown print their tables."""
    from rich.console import Console

    from formix.comparison import markdown_table, read_results, write_report

    paths = [a for a in arguments if not a.startswith("-")]
    options = [a for a in arguments if a.startswith("-")]
    out = next((a.removeprefix("--out=") for a in options if a.startswith("--out=")), "report.html")
    unknown = [a for a in options if a != "--markdown" and not a.startswith("--out=")]
    if unknown or not paths:
        raise ValueError("usage: formix report RESULTS.json ... [--out=report.html] [--markdown].")
    results = [read_results(path) for path in paths]
    if "--markdown" in options:
        print("\n\n".join(markdown_table(result) for result in results))
        return 0
    write_report(results, out)
    Console().print(f"Report: {out}", soft_wrap=True)
    return 0


def data(arguments: list[str]) -> int:
    """List the data sets that --data takes."""
    from formix.data import list_data

    for name, line in list_data().items():
        print(f"{name:16} {line}")
    return 0


def implementations(arguments: list[str]) -> int:
    """List which implementation of which operator can run on this machine."""
    from formix.ops import implementations as known

    for row in known():
        print(f"{row.op:22} {row.impl:10} {'yes, ' + row.isa if row.available else 'no: ' + row.reason}")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "compare": compare,
    "report": report,
    "analyze": analyze,
    "designs": designs,
    "data": data,
    "implementations": implementations,
}


def _compare_configs(studies: list[str], flags: list[str]) -> list[CompareConfig]:
    """One configuration per study file, or one of the flags alone; flags override the files."""
    from formix.comparison import CompareConfig

    if not studies:
        return [_parse(CompareConfig, "compare", flags)]
    configs = []
    for study in studies:
        if not Path(study).is_file():
            raise ValueError(f"{study} is no file; give a study's YAML.")
        try:
            config = _parse(CompareConfig, "compare", ["--config", study, *flags])
        except ValueError as error:
            raise ValueError(f"{study}: {error}") from None
        default = CompareConfig.__dataclass_fields__["out"].default
        if config.out == default:
            config = dataclasses.replace(config, out=f"runs/{Path(study).stem}")
        elif len(studies) > 1:
            config = dataclasses.replace(config, out=f"{config.out}/{Path(study).stem}")
        configs.append(config)
    if len({config.out for config in configs}) < len(configs):
        raise ValueError("Two studies would write to the same directory; give their files different names.")
    return configs


def _parse(config_class: Any, verb: str, flags: list[str]) -> Any:
    """The dataclass out of flags and YAML; both dashes and underscores are taken in flags' names."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=f"formix {verb}", exit_on_error=False, description=config_class.__doc__)
    parser.add_argument("--config", action="config", help="a YAML file with these settings")
    parser.add_class_arguments(config_class)
    names = [_underscored(flag) for flag in flags]
    try:
        parsed = parser.parse_args(names)
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    values = {k: v for k, v in parsed.as_dict().items() if k != "config"}
    return config_class(**values)


def _underscored(flag: str) -> str:
    if not flag.startswith("--"):
        return flag
    name, equals, value = flag.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


@contextlib.contextmanager
def _progress_display() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
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


def _summary(verb: Callable[..., int]) -> str:
    return (verb.__doc__ or "").splitlines()[0]


def _fail(sentence: str) -> int:
    print(f"formix: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
