"""Configurations out of flags and YAML files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, get_type_hints


def parse(config_class: Any, verb: str, flags: list[str]) -> Any:
    """The dataclass out of flags and YAML; both dashes and underscores are taken in flags' names."""
    return parse_several([config_class], verb, flags)[0]


def parse_several(config_classes: Sequence[Any], verb: str, flags: list[str]) -> list[Any]:
    """Several dataclasses whose fields stand side by side in the flags and the YAML."""
    from jsonargparse import ArgumentError, ArgumentParser

    about = " ".join(config_class.__doc__ for config_class in config_classes)
    parser = ArgumentParser(prog=f"formix {verb}", exit_on_error=False, description=about)
    parser.add_argument("--config", action="config", help="a YAML file with these settings")
    for config_class in config_classes:
        parser.add_class_arguments(config_class)
    try:
        values = parser.parse_args([_underscored(flag) for flag in flags]).as_dict()
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    return [_build(config_class, values) for config_class in config_classes]


def _build(config_class: Any, values: dict[str, Any]) -> Any:
    kinds = get_type_hints(config_class)
    arguments = {}
    for field in dataclasses.fields(config_class):
        value = values[field.name]
        nested = dataclasses.is_dataclass(kinds[field.name]) and isinstance(value, dict)
        arguments[field.name] = kinds[field.name](**value) if nested else value
    return config_class(**arguments)


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
