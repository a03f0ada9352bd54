"""Configurations out of flags and YAML files."""

from __future__ import annotations

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
