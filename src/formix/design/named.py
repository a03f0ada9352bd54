"""The names of designs, their combinations and options."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from formix.design.checks import deep_tuple
from formix.design.core import Design, part_from_dict
from formix.design.layout import Layout
from formix.design.mixers import GatedUnit, Pointwise, Sima, Softmax
from formix.design.wiring import Wiring

# name -> (the parts it chooses, one line about it)
_NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "softmax": ({"mixer": Softmax()}, "scaled dot-product attention, then an FFN: the baseline"),
    "relu": ({"mixer": Pointwise()}, "ReLU attention divided by sequence length (arXiv 2309.08586)"),
    "sima": ({"mixer": Sima()}, "softmax-free attention with l1-normalised queries and keys (arXiv 2206.08898)"),
    "activator": ({"mixer": GatedUnit()}, "a gated linear unit in place of attention (arXiv 2405.15953)"),
    "activator-glu": (
        {"mixer": GatedUnit(), "layout": Layout(ffn=False)},
        "Activator without the FFN: gated units alone (arXiv 2405.15953)",
    ),
    "paf": (
        {"layout": Layout(parallel=True, norm="post")},
        "attention and FFN in parallel, one norm after them (arXiv 2305.13297)",
    ),
    "parallel": (
        {"layout": Layout(parallel=True, norm="pre")},
        "attention and FFN in parallel behind one norm (GPT-J, PaLM, ViT-22B)",
    ),
    "skip": ({"wiring": Wiring()}, "some heads read keys and values of an earlier layer (arXiv 2406.11274)"),
}


def list_designs() -> dict[str, str]:
    """Names of the designs, each with one line about it; join names with '+' to combine them."""
    return {name: line for name, (_, line) in _NAMED.items()}


def design(name: str | Design | Mapping[str, Any], **options: Any) -> Design:
    """The design of that name, with options for any field of its parts.

    Args:
        name: a name of `list_designs()`, several joined by '+' (``"relu+paf+skip"``), each with options in
            parentheses if wanted (``"relu(length_exponent=0.5)+paf"``), a `Design`, or one as plain data.
        **options: fields of the mixer (``length_exponent=0.5``), the layout (``norm="pre"``), the wiring
            (``source="distance(2)"``, ``heads=3``) or the design (``official=True``, ``layers={0: "softmax"}``: for
            each layer that differs a name, a mixer, a Layout or both, (mixer, Layout); also
            ``'relu(layers={"0": "softmax"})'``).

    Raises:
        ValueError: unknown name or option, two names that choose the same part, or a meaningless combination.
    """
    if isinstance(name, Design):
        return _with_options(name, options, str(name.mixer.kind))
    if isinstance(name, Mapping):
        return _with_options(Design.from_dict(name), options, "this design")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"A design is a name such as 'relu+paf' or a Design, not {name!r}.")
    parts: dict[str, Any] = {}
    chosen_by: dict[str, str] = {}
    inline: dict[str, Any] = {}
    for term in split_outside_brackets(name, "+"):
        base, written = _parse_term(term, name)
        inline |= written
        for part, value in _NAMED[base][0].items():
            if part in parts:
                raise ValueError(
                    f"Design {name!r}: {chosen_by[part]!r} and {base!r} both choose the {part}; combine names that "
                    "choose different parts, or set single layers with `layers`."
                )
            parts[part], chosen_by[part] = value, base
    try:
        return _with_options(Design(**parts), inline | options, name)
    except ValueError as error:
        raise ValueError(f"Design {name!r}: {error}") from None


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """The parts of `text` between separators outside all brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _parse_term(term: str, name: str) -> tuple[str, dict[str, Any]]:
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", term)
    if not match or match[1] not in _NAMED:
        raise ValueError(
            f"{term.strip() or name!r} is no design; known are {', '.join(_NAMED)}, and combinations "
            "such as 'relu+paf'."
        )
    options: dict[str, Any] = {}
    for item in split_outside_brackets(match[2], ",") if match[2] else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"Design {name!r}: {item.strip()!r} is no option; write option=value.")
        if key.strip() in options:
            raise ValueError(f"Design {name!r}: the option {key.strip()!r} is given twice.")
        try:
            options[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[key.strip()] = {"None": None, "True": True, "False": False}.get(value.strip(), value.strip())
    return match[1], options


def _single_layer(number: Any, part: Any) -> tuple[Any, Any]:
    """One entry of `layers` as people write it: the number as text (JSON has no others), the part by a design's name
    or as plain data."""
    if isinstance(number, str) and re.fullmatch(r"-?\d+", number):
        number = int(number)
    if isinstance(part, Mapping):
        return number, part_from_dict(part)
    if not isinstance(part, str | Design):
        return number, part
    chosen, plain = design(part), Design()
    if replace(chosen, mixer=plain.mixer, layout=plain.layout) != plain:
        raise ValueError(
            f"layers has {number!r}: {part!r}; a single layer takes another mixer, another layout or both, not more."
        )
    named: set[str] = set()  # in words: the softmax of "softmax+paf" is a choice, though plain designs have it too
    if isinstance(part, str):
        named = {name for term in split_outside_brackets(part, "+") for name in _NAMED[_parse_term(term, part)[0]][0]}
    own = [
        getattr(chosen, name)
        for name in ("mixer", "layout")
        if name in named or getattr(chosen, name) != getattr(plain, name)
    ]
    return number, tuple(own) if len(own) == 2 else (own or [chosen.mixer])[0]


def _with_options(base: Design, options: dict[str, Any], name: str) -> Design:
    remaining = dict(options)
    changes: dict[str, Any] = {k: remaining.pop(k) for k in list(remaining) if k in {f.name for f in fields(Design)}}
    if isinstance(changes.get("layers"), Mapping):
        changes["layers"] = dict(_single_layer(number, part) for number, part in changes["layers"].items())
    base = replace(base, **changes) if changes else base
    for part_name in ("mixer", "layout", "wiring"):
        part = getattr(base, part_name)
        if part is None:
            continue
        names = {f.name for f in fields(part)}
        mine = {k: remaining.pop(k) for k in list(remaining) if k in names}
        if mine:
            base = replace(base, **{part_name: replace(part, **{k: deep_tuple(v) for k, v in mine.items()})})
    if remaining:
        parts = [p for p in (base.mixer, base.layout, base.wiring) if p is not None]
        known = [f.name for p in parts for f in fields(p)]
        raise ValueError(
            f"{', '.join(map(repr, remaining))} is no option of design {name!r}; it has {', '.join(known)}."
        )
    return base
