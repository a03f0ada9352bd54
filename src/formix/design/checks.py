"""What the parts of a design ask of their fields."""

from __future__ import annotations

from typing import Any


def check(value: object, allowed: tuple[object, ...], what: str) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def check_flags(part: object, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(part, name), bool):
            raise ValueError(f"{name} is {getattr(part, name)!r}; it must be true or false.")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def deep_tuple(value: Any) -> Any:
    return tuple(deep_tuple(v) for v in value) if isinstance(value, list | tuple) else value
