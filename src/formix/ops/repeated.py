"""Calls like an earlier one go straight to the kernel.

Checks, dispatch and packing take longer than a kernel needs for a short sequence, and a model makes the same call over
and over. What one call found is kept here under all that it depends on: options and number of threads, and in
native/repeat.cpp the shapes, strides and types of its tensors. A later call that agrees in these, and that only the
kernel has to see, is one call from Python, which allocates the output and runs.

PyTorch before 2.10 does not show its tensors to C; there every call takes the long way.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from formix.ops import registry
from formix.ops.native_library import library_on_tensors

_MOST = 1024  # calls are kept, then all are forgotten


class Packed:
    """A kernel with its arguments in eight-byte words, all but the addresses at `places` (in words)."""

    __slots__ = ("kernel", "places", "words")

    def __init__(self, kernel: Callable[[int], int], arguments: bytes, places: tuple[int, ...]) -> None:
        self.kernel, self.places, self.words = kernel, places, array("q", arguments)

    def __call__(self, *tensors: Tensor | None) -> None:
        words = self.words[:]
        for place, t in zip(self.places, tensors, strict=True):
            if t is not None:
                words[place] = t.data_ptr()
        if self.kernel(words.buffer_info()[0]):
            raise MemoryError("The attention kernels could not allocate their working memory.")


@dataclass(frozen=True, slots=True)
class Gradient:
    """Of an attention with everything known but the numbers in its tensors."""

    shapes: tuple[tuple[int, ...], ...]  # of query, key and value
    strides: tuple[tuple[int, ...], ...]  # of their gradients
    options: tuple[Any, ...]  # what all gradients take after grad_out, query, key, value and mask
    # Of (query, key, value, mask) and the gradients of (output, query, key, value).
    pack: Callable[[tuple[Tensor | None, ...], tuple[Tensor, ...]], Packed]
    differentiable: Callable[..., tuple[Tensor, ...]]
    packed: dict[Hashable, Packed] = field(default_factory=dict)  # by all of the tensors but their numbers

    def __call__(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Those of query, key and value."""
        inputs = query, key, value, mask
        tensors = [t for t in (grad_out, *inputs) if t is not None]  # hooks on saved tensors may have changed them all
        if (
            torch.is_grad_enabled() or _observed() or not all(map(_is_plain, tensors))
            or any(t.dtype != query.dtype or t.stride(-1) != 1 for t in (grad_out, key, value, query))
            or tuple(tuple(t.shape) for t in (query, key, value)) != self.shapes
        ):  # fmt: skip
            return self.differentiable(grad_out, *inputs, *self.options)
        gradients = tuple(
            torch.empty_strided(shape, strides, dtype=query.dtype)
            for shape, strides in zip(self.shapes, self.strides, strict=True)
        )
        known = (torch.get_num_threads(), *((t.shape, t.stride(), t.dtype) for t in tensors))
        packed = self.packed.get(known)
        if packed is None:
            packed = self.packed[known] = self.pack(inputs, (grad_out, *gradients))
        packed(*inputs, grad_out, *gradients)
        return gradients


class _WithGradient(torch.autograd.Function):
    """What the operator's registered gradient does, with less around it."""

    @staticmethod
    def forward(
        ctx: Any, calls: _Calls, gradient: Gradient, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(query, key, value, mask)
        return calls.repeat(calls.first, query, key, value, mask)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradient(grad_out, *ctx.saved_tensors), None


class _Calls:
    """Those of one operator with the same options and number of threads."""

    __slots__ = ("find", "first", "gradients", "library", "repeat")

    def __init__(self, library: ctypes.PyDLL) -> None:
        self.library, self.find, self.repeat = library, library.formix_find, library.formix_repeat
        self.first: int | None = None  # of a list in native/repeat.cpp
        self.gradients: dict[int, Gradient] = {}

    def __del__(self) -> None:
        self.library.formix_forget(self.first)


_kept: dict[Hashable, _Calls] = {}


def signature(
    name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: tuple[Any, ...]
) -> Hashable | None:
    """All that a call depends on except its tensors; among `options` the types of those whose equals (1, 1.0 and True)
    are no such options. None if it has to take the long way, because autocast has something to cast or a transform, a
    mode, a tracer or a profiler wants to know of it."""
    if _observed() or not (type(query) is type(key) is type(value) is Tensor):
        return None
    if query.is_neg() or key.is_neg() or value.is_neg() or not (mask is None or type(mask) is Tensor):
        return None
    if torch.is_autocast_enabled("cpu") and {query.dtype, key.dtype, value.dtype} != {torch.get_autocast_dtype("cpu")}:
        return None
    return name, options, torch.get_num_threads()


def _is_plain(t: Tensor) -> bool:
    """It has numbers in the CPU's memory, and they mean what they say."""
    return not (
        type(t) is not Tensor or not t.is_cpu or t.is_neg() or t._is_zerotensor() or t.layout != torch.strided
        or torch._C._functorch.is_legacy_batchedtensor(t)
    )  # fmt: skip


def _observed() -> bool:
    return (
        torch.compiler.is_compiling()
        or registry._portable
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def keep(
    signature: Hashable,
    tensors: tuple[Tensor | None, ...],
    kernel: Any,  # a function of the library
    arguments: bytes,
    places: tuple[int, ...],
    gradient: Gradient,
) -> None:
    """Keeps a call of `kernel` with these tensors (query, key, value, mask and output), whose addresses stand at
    `places` (in words) among its arguments."""
    library = library_on_tensors()
    if library is None:
        return
    if sum(len(calls.gradients) for calls in _kept.values()) >= _MOST:
        _kept.clear()
    calls = _kept.setdefault(signature, _Calls(library))
    address = ctypes.cast(kernel, ctypes.c_void_p)
    where = (ctypes.c_int64 * len(places))(*places)
    kept = library.formix_keep(calls.first, *tensors, address, arguments, len(arguments) // 8, where)
    if kept is not None:
        calls.gradients[kept] = gradient
        calls.first = kept


def run(signature: Hashable, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor | None:
    """The result of a call like one that was kept, or None if there is none."""
    try:
        calls = _kept.get(signature)
    except TypeError:  # an option that is a list, say: the checks have a sentence for it
        return None
    if calls is None:
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        found = calls.find(calls.first, query, key, value, mask)
        return None if found is None else _WithGradient.apply(calls, calls.gradients[found], query, key, value, mask)
    return calls.repeat(calls.first, query, key, value, mask)
