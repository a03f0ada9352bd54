"""Configurations out of flags and YAML files."""

from __future__ import annotations

import re
from typing import Any


def parse(config_class: Any, verb: str, flags: list[str]) -> Any:
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


def names(text: str, what: str, *, empty: bool = False) -> tuple[str, ...]:
    """The parts of a list with commas; commas inside parentheses belong to a design's options.

    Raises:
        ValueError: a part is there twice, or there is none and `empty` does not allow it.
    """
    found = tuple(part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip())
    if len(set(found)) < len(found):
        raise ValueError(f"{what} is {text!r}; something is named twice.")
    if not found and not empty:
        raise ValueError(f"{what} is empty; name at least one.")
    return found


def numbers(text: str, what: str) -> tuple[int, ...]:
    """The numbers of a list with commas.

    Raises:
        ValueError: one is no positive whole number or is there twice, or there is none.
    """
    found = names(text, what)
    if wrong := [part for part in found if not part.isdecimal() or int(part) < 1]:
        raise ValueError(f"{what} has {wrong[0]!r}; it must be positive whole numbers with commas, such as '197,785'.")
    return tuple(map(int, found))
