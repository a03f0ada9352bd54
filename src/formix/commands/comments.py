"""The comments beside a dataclass's fields, which are what --help says of them."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
from typing import Any, cast


@functools.cache
def comments(config_class: Any) -> dict[str, str]:
    """The comments of a dataclass's fields: those on the lines above a field, and the one behind it."""
    found: dict[str, str] = {}
    for kind in reversed([k for k in config_class.__mro__ if dataclasses.is_dataclass(k)]):
        source = textwrap.dedent(inspect.getsource(cast(type, kind)))
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
        text = {t.start[0]: t.string.lstrip("# ") for t in tokens}
        alone = {t.start[0] for t in tokens if not t.line[: t.start[1]].strip()}
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno
                while first - 1 in alone:
                    first -= 1
                lines = [text[i] for i in range(first, (node.end_lineno or node.lineno) + 1) if i in text]
                found[node.target.id] = " ".join(lines)
    return found
