"""What there is: `formix designs`, `formix data`, `formix implementations`."""

from __future__ import annotations


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


def data(arguments: list[str]) -> int:
    """List the data sets that --data takes."""
    from formix.data import list_data

    _no_arguments("data", arguments)
    for name, line in list_data().items():
        print(f"{name:16} {line}")
    return 0


def implementations(arguments: list[str]) -> int:
    """List which implementation of which operator can run on this machine."""
    from formix.ops import implementations as known

    _no_arguments("implementations", arguments)
    for row in known():
        print(f"{row.op:22} {row.impl:10} {'yes, ' + row.isa if row.available else 'no: ' + row.reason}")
    return 0


def _no_arguments(verb: str, arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"formix {verb} takes no arguments, and was given {' '.join(arguments)}.")
