"""Dataclasses as JSON files: checked when read, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
UNFINISHED = ".tmp"  # how a file that is being written ends, in a name that begins with a dot


def read(kind: type[Record], path: str | os.PathLike[str], writer: str) -> Record:
    """Read and check a file of a dataclass; a field `schema`, if it has one, must have the class's own default.

    Args:
        writer: the command that writes such files, for the messages.

    Raises:
        ValueError: the file is missing, damaged or of another kind; the file and the field are named.
    """
    path = Path(path)
    remedy = f"restore the file from a copy, or move it away and run {writer} again"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give the path of a file that {writer} wrote") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error.msg} at line {error.lineno}); {remedy}") from None
    schema = getattr(kind, "schema", None)
    if schema is not None and isinstance(value, dict) and value.get("schema", schema) != schema:
        raise ValueError(
            f"{path}: schema is {value['schema']!r}, but this formix reads {schema!r} here; give a file that "
            f"{writer} wrote, use the formix version that wrote this one, or run {writer} again"
        )
    try:
        record: Record = parse(kind, value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {remedy}") from None
    return record


def write(record: Any, path: str | os.PathLike[str]) -> None:
    """Write a dataclass; the file appears complete or not at all. Numbers that are not finite become null."""
    write_atomically(path, json.dumps(plain(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def parse(kind: Any, value: Any, where: str = "") -> Any:
    """`value` as `kind`, following the annotations of the dataclasses; `where` names the field in messages."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _parse_record(kind, value, where)
    if origin in (types.UnionType, Union):  # only `X | None` occurs
        return None if value is None else parse(arguments[0], value, where)
    if origin is Literal:
        return value if value in arguments else _reject(where, value, "one of " + ", ".join(map(repr, arguments)))
    if origin is dict:
        entries = value if isinstance(value, dict) else _reject(where, value, "an object {...}")
        return {key: parse(arguments[1], entry, f"{where}.{key}") for key, entry in entries.items()}
    if origin is tuple:
        items = value if isinstance(value, list) else _reject(where, value, "a list [...]")
        return tuple(parse(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(items))
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if is_number else _reject(where, value, "a finite number")
    if kind is int:
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return value if is_count else _reject(where, value, "a whole number, 0 or more")
    return value if isinstance(value, kind) else _reject(where, value, {str: "text", bool: "true or false"}[kind])


def _parse_record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        _reject(where or "the file", value, "an object {...}")
    hints, prefix = get_type_hints(kind), f"{where}." if where else ""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ValueError(f"{prefix}{name} is not a field of this format")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name not in value and (required or name == "schema"):
            raise ValueError(f"{prefix}{name} is missing")
    parsed = {name: parse(hints[name], entry, f"{prefix}{name}") for name, entry in value.items()}
    try:
        return kind(**parsed)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _reject(where: str, value: Any, expected: str) -> Any:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise ValueError(f"{where} is {shown}, expected {expected}")


def plain(value: Any) -> Any:
    """Dataclasses, tuples and numbers as JSON has them."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file at `path` in one step, so that a crash leaves the old file or the new one, never a part."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives another name to write to; the file there takes the place of `path` at the end, and is removed if that is an
    exception's."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
