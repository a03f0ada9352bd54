"""Which layers of a model a conversion changes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from formix.design import Design, Layout, Softmax
from formix.design import design as find_design


def choose_layers(
    design: str | Design, depth: int, *, layers: Sequence[int] | str | None = None, keep: str | None = None
) -> Design:
    """`design` for the chosen layers of a model of `depth` layers; the others stay as the source has them.

    Args:
        layers: numbers of the layers to convert, as a sequence or "0,2,4-7"; negative numbers count from the end.
        keep: "softmax:0,1": layers that keep softmax attention in the source's own layout.

    Raises:
        ValueError: numbers that the model does not have, or another mixer than softmax to keep.
    """
    chosen = find_design(design)
    converted = set(range(depth)) if layers is None else _numbers(layers, depth, "layers")
    if keep:
        mixer, _, numbers = keep.partition(":")
        if mixer != "softmax" or not numbers:
            raise ValueError(
                f"keep is {keep!r}; write softmax:NUMBERS, such as softmax:0,1: the source has no other mixer."
            )
        converted -= _numbers(numbers, depth, "keep")
    if not converted:
        raise ValueError(f"layers={layers!r} and keep={keep!r} leave no layer to convert.")
    kept = sorted(set(range(depth)) - converted)
    if not kept:
        return chosen
    if any(part in range(-depth, depth) for part in chosen.layers):
        raise ValueError("The design names single layers itself; leave out layers and keep, or the design's layers.")
    own: dict[int, Any] = {}
    for layer in kept:
        own |= {layer: Softmax(), layer - depth: Layout()}  # a mixer and a layout, by the layer's two numbers
    wiring = chosen.wiring
    if wiring is not None:
        sources = tuple(None if i in kept else s for i, s in enumerate(wiring.resolve(depth)))
        wiring = dataclasses.replace(wiring, source=sources) if any(s is not None for s in sources) else None
    if wiring is None and not own:
        return chosen
    return dataclasses.replace(chosen, layers=own, wiring=wiring)


def parse_numbers(text: str) -> list[int]:
    """ "0,2,4-7" as numbers."""
    numbers: list[int] = []
    for part in str(text).split(","):
        span = re.fullmatch(r"\s*(-?\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not span:
            raise ValueError(f"{text!r} are no layer numbers; write them as 0,2,4-7.")
        first = int(span[1])
        numbers += range(first, int(span[2]) + 1) if span[2] else [first]
    return numbers


def _numbers(given: Sequence[int] | str, depth: int, what: str) -> set[int]:
    numbers = parse_numbers(given) if isinstance(given, str) else [int(n) for n in given]
    for number in numbers:
        if not -depth <= number < depth:
            raise ValueError(f"{what} names layer {number}; the model has layers 0 to {depth - 1}.")
    return {number % depth for number in numbers}
