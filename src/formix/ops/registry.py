"""Which implementation of which operator can run here, and the one that a call gets."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

from formix.ops import triton

IMPLS = ("auto", "reference", "native", "triton")
# operators with more than the reference; the others are compositions of these and of torch's own
ACCELERATED = ("pointwise_attention", "l1_attention")
OPERATORS = (*ACCELERATED, "skip_layer_attention", "gated_unit")

NO_KERNELS = "this installation of formix has no CPU kernels, or FORMIX_NATIVE=0 turns them off"

_log = logging.getLogger("formix")
_portable = False


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Inside, "auto" is the plain-torch reference, and what is traced has no operators but PyTorch's own."""
    global _portable
    before, _portable = _portable, True
    try:
        yield
    finally:
        _portable = before


def is_portable() -> bool:
    """Whether this is inside `portable`."""
    return _portable


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One implementation of one operator on this machine."""

    op: str
    impl: str
    available: bool
    isa: str  # instruction set or device it runs on
    reason: str  # why it is not available; empty if it is


def native_module() -> ModuleType | None:
    """`formix.ops.native`, or None where this installation has no CPU kernels or FORMIX_NATIVE=0 turns them off.
    (FORMIX_NATIVE may also name another build of the library.)"""
    return _NATIVE


def _import_native() -> ModuleType | None:
    if os.environ.get("FORMIX_NATIVE") == "0":
        return None
    try:
        return importlib.import_module("formix.ops.native")
    except ModuleNotFoundError as error:
        if error.name != "formix.ops.native":
            raise
        return None


_NATIVE = _import_native()  # once and here: torch.compile cannot trace an import inside an operator


def _native_state() -> tuple[bool, str]:
    module = native_module()
    return module.available() if module else (False, NO_KERNELS)


def implementations() -> list[Implementation]:
    """Which implementation of which operator can run here, on which instruction set, and why not otherwise.

    The environment variable FORMIX_ISA, set to avx512_bf16, avx512, avx2 or portable, holds the CPU kernels to a lower
    instruction set than the best; FORMIX_NATIVE=0 turns them off.
    """
    rows = []
    for op in OPERATORS:
        states = {"reference": (True, "any device of PyTorch")}
        if op in ACCELERATED:
            states |= {"native": _native_state(), "triton": triton.available()}
        for impl, (usable, told) in states.items():
            isa, reason = (told, "") if usable else ("", told)
            rows.append(Implementation(op=op, impl=impl, available=usable, isa=isa, reason=reason))
    return rows


def choose(
    op: str, impl: str, device: torch.device, refusal: Callable[[str], str | None]
) -> Literal["reference", "native", "triton"]:
    """The implementation for one call: the asked one, or for "auto" the device's kernels where they can run it.

    Args:
        refusal: of "native" or "triton": why it cannot run this call, or None if it can.

    Raises:
        ValueError: `impl` is unknown, or was asked for and cannot run this call.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(map(repr, IMPLS))}.")
    if impl == "reference" or (impl == "auto" and _portable):
        return "reference"
    kernels: Literal["native", "triton"] = "native"
    if impl == "triton" or (impl == "auto" and device.type == "cuda"):
        kernels = "triton"
    reason = refusal(kernels)
    if impl != "auto":
        if reason is not None:
            raise ValueError(f"impl={impl!r} cannot run this {op}: {reason}. Use impl='auto' or 'reference'.")
        return kernels
    chosen: Literal["reference", "native", "triton"] = kernels if reason is None else "reference"
    if not torch.compiler.is_compiling():
        _announce(op, chosen, reason)
    return chosen


@functools.cache
def _announce(op: str, chosen: str, reason: str | None) -> None:
    _log.info("%s runs as %s%s", op, chosen, f" ({reason})" if reason else "")
