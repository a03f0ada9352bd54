"""Weight maps as data: which tensor of a source becomes which of formix's, by what operation, and back.

A family's `Rule`s are patterns; `resolve` turns them into the `Move`s of one model, which are plain names and can be
saved. Every operation is undone without rounding, so `backward(forward(state))` gives every tensor bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAME = "same"
ROWS = "rows"  # several tensors one below the other: the projections of queries, keys and values in one
ZERO_ROWS = r"zero_rows\((\d+),(\d+)\)"  # zero_rows(p,n): n rows of zeros at place p of [1, N, C]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Source tensors whose whole names match the patterns, with equal named groups, make one target tensor."""

    sources: tuple[str, ...]  # regular expressions
    target: str  # with the groups in braces
    operation: str = SAME


@dataclass(frozen=True, kw_only=True)
class Move:
    """The same for one tensor."""

    sources: tuple[str, ...]
    target: str
    operation: str = SAME


def resolve(rules: Iterable[Rule], names: Iterable[str]) -> tuple[list[Move], list[str]]:
    """The moves of a model with these tensors, and the tensors that no rule names."""
    names = list(names)
    free = dict.fromkeys(names)
    moves = []
    for rule in rules:
        found: dict[str, dict[int, str]] = {}
        for place, pattern in enumerate(rule.sources):
            for name in names:
                match = re.fullmatch(pattern, name)
                if match:
                    found.setdefault(rule.target.format(**match.groupdict()), {})[place] = name
        for target, parts in found.items():
            if len(parts) != len(rule.sources):
                raise ValueError(
                    f"The source has {', '.join(parts.values())} but not all that {target} is made of; its classes "
                    "are of another version of transformers or timm than formix knows."
                )
            moves.append(
                Move(sources=tuple(parts[i] for i in range(len(parts))), target=target, operation=rule.operation)
            )
            for name in parts.values():
                free.pop(name, None)
    return moves, list(free)


def forward(moves: Iterable[Move], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The source's tensors under formix's names."""
    return {move.target: _join([state[name] for name in move.sources], move.operation) for move in moves}


def backward(moves: Iterable[Move], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """formix's tensors under the source's names."""
    result: dict[str, Tensor] = {}
    for move in moves:
        if move.target in state:
            parts = _split(state[move.target], move.operation, len(move.sources))
            result |= dict(zip(move.sources, parts, strict=True))
    return result


def _join(parts: Sequence[Tensor], operation: str) -> Tensor:
    if operation == ROWS:
        return torch.cat(list(parts))
    if rows := re.fullmatch(ZERO_ROWS, operation):
        place, number = map(int, rows.groups())
        whole = parts[0]
        return torch.cat([whole[:, :place], whole.new_zeros(1, number, whole.shape[2]), whole[:, place:]], dim=1)
    assert operation == SAME, operation
    return parts[0]


def _split(whole: Tensor, operation: str, number: int) -> Sequence[Tensor]:
    if operation == ROWS:
        return [part.clone() for part in whole.chunk(number)]
    if rows := re.fullmatch(ZERO_ROWS, operation):
        place, zeros = map(int, rows.groups())
        return [torch.cat([whole[:, :place], whole[:, place + zeros :]], dim=1)]
    assert operation == SAME, operation
    return [whole]
