"""The written file against the model: other batches, lengths and padding than those that were traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from formix.export.program import Program
from formix.export.sheet import Case, Check

# of the largest output, by the type of the weights; runtimes sum in another order, and in 16 bits round elsewhere
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# sizes of a call, and its padding; what is traced with is none of them
CALLS: tuple[tuple[dict[str, int], str], ...] = (
    ({"batch": 1, "tokens": 5, "choices": 1, "past": 0}, "none"),
    ({"batch": 3, "tokens": 33, "choices": 3, "past": 4}, "right"),
    ({"batch": 3, "tokens": 12, "choices": 2, "past": 9}, "left"),
    ({"batch": 1, "tokens": 1, "choices": 2, "past": 6}, "none"),
)
TRACED = {"batch": 2, "tokens": 7, "choices": 2, "past": 3}


@torch.no_grad()
def check(
    program: Program,
    source: Program,
    call: Callable[..., tuple[Tensor, ...]],
    *,
    runtime: str,
    tolerance: float,
) -> Check:
    """Compare what a file computes with the program in PyTorch, and with the source's, which may be of another type.

    Raises:
        ValueError: outputs that are not finite or of another shape, or a difference above the tolerance.
    """
    cases: list[Case] = []
    largest = to_source = 0.0
    for seed, (wanted, padding) in enumerate(CALLS):
        text = len(program.inputs) > 1
        if not text and seed > 1:
            break  # images have a batch and nothing else
        if wanted["tokens"] == 1 and "past" not in program.axes and tolerance > TOLERANCES["float32"]:
            break  # SimA's norm over a single token leaves the sign, which in 16 bits is rounding's
        sizes, kind = program.sizes(wanted), padding if text else "none"
        inputs = program.example(sizes, padding=kind, seed=seed + 1)
        expected, found = program(*inputs), call(*inputs)
        original = expected if source is program else source(*inputs)
        if not _finite(original):
            raise ValueError(
                "The model itself gives numbers that are not finite, on random inputs; nothing is written."
            )
        if not _finite(expected):
            dtype = str(next(program.parameters()).dtype).removeprefix("torch.")
            raise ValueError(
                f"In {dtype} the model gives numbers that are not finite, and as it is saved it does not; nothing is "
                "written. Give another --dtype, or leave it out."
            )
        for a, b in zip(found, expected, strict=True):
            if a.shape != b.shape:
                raise ValueError(
                    f"{runtime} gives an output of shape {list(a.shape)} where the model's is {list(b.shape)} "
                    f"({_words(sizes, kind)}); nothing is written."
                )
        difference = _difference(found, expected)
        cases.append(Case(sizes=sizes, padding=kind, difference=difference))  # type: ignore[arg-type]
        largest = max(largest, *(float(x.abs().max()) for x in expected[: program.judged]))
        to_source = _most(to_source, _difference(found, original))
    worst = cases[0]
    for case in cases:
        worst = case if _most(worst.difference, case.difference) != worst.difference else worst
    relative = worst.difference / max(largest, torch.finfo(torch.float32).tiny)
    if not relative <= tolerance:  # nor if it is no number
        raise ValueError(
            f"{runtime} differs from the model by {worst.difference:.3g} ({_words(worst.sizes, worst.padding)}), which "
            f"is {relative:.3g} of the largest output, {largest:.3g}; the tolerance is {tolerance:g}. Nothing is "
            "written; give a larger --tolerance if that is acceptable."
        )
    return Check(
        runtime=runtime,
        cases=tuple(cases),
        difference=worst.difference,
        largest=largest,
        relative=relative,
        tolerance=tolerance,
        to_source=to_source,
    )


def _finite(outputs: tuple[Tensor, ...]) -> bool:
    return all(bool(x.isfinite().all()) for x in outputs)


def _difference(found: Any, expected: Any) -> float:
    most = 0.0
    for a, b in zip(found, expected, strict=True):
        most = _most(most, float((a - b).abs().max()))
    return most


def _most(a: float, b: float) -> float:
    """The larger; what is no number is larger than all."""
    return a if a != a or a >= b else b


def _words(sizes: dict[str, int], padding: str) -> str:
    told = [f"{name} {n}" for name, n in sizes.items()] or ["fixed sizes"]
    return ", ".join(told) + (f", padding on the {padding}" if padding != "none" else "")
