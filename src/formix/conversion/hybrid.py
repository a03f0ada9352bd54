"""Which layers of a model a conversion changes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from numbers import Integral

from formix.design import Design, Wiring
from formix.design import design as find_design


def choose_layers(
    design: str | Design,
    depth: int,
    own: Design | None,
    *,
    layers: Sequence[int] | str | None = None,
    keep: str | None = None,
) -> Design:
    """`design` for the chosen layers of a model of `depth` layers; the others stay as the source has them.

    Args:
        own: the source's design; None: its mixer is none of formix's, and no layer can stay.
        layers: numbers of the layers to convert, as a sequence or "0,2,4-7"; negative numbers count from the end.
        keep: "softmax:0,1": layers that keep softmax attention in the source's own layout.

    Raises:
        ValueError: numbers that the model does not have, a mixer to keep that the source has not, or two wirings that
            differ in their heads.
    """
    chosen = find_design(design)
    converted = set(range(depth)) if layers is None else _numbers(layers, depth, "layers")
    if keep is not None:
        mixer, _, numbers = keep.partition(":") if isinstance(keep, str) else ("", "", "")
        if mixer != "softmax" or not numbers:
            raise ValueError(
                f"keep is {keep!r}; write softmax:NUMBERS, such as softmax:0,1, and for layers of another mixer "
                "--layers with those to convert."
            )
        stay = _numbers(numbers, depth, "keep")
        if others := [i for i in sorted(stay) if own is not None and own.layer(i, depth).mixer.kind != mixer]:
            kind = own.layer(others[0], depth).mixer.kind  # type: ignore[union-attr]
            raise ValueError(
                f"keep is {keep!r}, but the source's mixer in layer {others[0]} is {kind}; name the layers to convert "
                "in layers instead."
            )
        converted -= stay
    if not converted:
        raise ValueError(f"layers={layers!r} and keep={keep!r} leave no layer to convert.")
    kept = sorted(set(range(depth)) - converted)
    if not kept:
        return chosen
    if any(part in range(-depth, depth) for part in chosen.layers):
        raise ValueError("The design names single layers itself; leave out layers and keep, or the design's layers.")
    if own is None:
        raise ValueError(
            "The source's own mixer, cross-covariance, is none of formix's, so that none of its layers can stay as it "
            "is; convert them all, without layers, keep or search."
        )
    parts = {i: (own.layer(i, depth).mixer, own.layer(i, depth).layout) for i in kept}
    return dataclasses.replace(
        chosen, layers=parts, wiring=_wiring(chosen, own, kept, depth), official=chosen.official or own.official
    )


def _wiring(chosen: Design, own: Design, kept: Sequence[int], depth: int) -> Wiring | None:
    """The kept layers read what they read in the source, the others what the design says."""
    sources = tuple((own if i in kept else chosen).layer(i, depth).source for i in range(depth))
    readers = {i in kept for i, s in enumerate(sources) if s is not None}
    used = [wiring for stays, wiring in ((False, chosen.wiring), (True, own.wiring)) if wiring and stays in readers]
    if not used:
        return None
    if used[0].heads != used[-1].heads:
        raise ValueError(
            f"The source's layers read earlier keys in heads {used[-1].heads} and the design's in {used[0].heads}; "
            "convert all layers that read any, or none."
        )
    return dataclasses.replace(used[0], source=sources)


def parse_numbers(text: str) -> list[int]:
    """ "0,2,4-7" as numbers."""
    numbers: list[int] = []
    for part in str(text).split(","):
        span = re.fullmatch(r"\s*(-?\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not span or (span[2] and int(span[2]) < int(span[1])):
            raise ValueError(f"{text!r} are no layer numbers; write them as 0,2,4-7.")
        numbers += range(int(span[1]), int(span[2] or span[1]) + 1)
    return numbers


def _numbers(given: Sequence[int] | str, depth: int, what: str) -> set[int]:
    if isinstance(given, str):
        numbers = parse_numbers(given)
    else:
        numbers = list(given) if isinstance(given, Iterable) else [None]
        if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers):
            raise ValueError(f"{what} is {given!r}; give whole numbers, as [0, 2], or a text, as '0,4-7'.")
    for number in numbers:
        if not -depth <= number < depth:
            raise ValueError(f"{what} names layer {number}; the model has layers 0 to {depth - 1}.")
    return {number % depth for number in numbers}
