"""Calls like an earlier one go straight to the kernel.

Checks, dispatch and packing take longer than a kernel needs for a short sequence, and a model makes the same call over
and over. What one call found is kept here under all that it depends on: shapes, strides, types, options and the number
of threads. A later call that agrees in these, and that only the kernel has to see, changes the addresses and runs.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
class Call:
    """An attention with everything known but the numbers in its tensors, and its gradient."""

    forward: Packed  # of query, key, value, output and mask
    shapes: tuple[tuple[int, ...], ...]  # of query, key, value and output
    strides: tuple[tuple[int, ...], ...]  # of their gradients, and of the output
    options: tuple[Any, ...]  # what all gradients take after grad_out, query, key, value and mask
    # Of (query, key, value, mask) and the gradients of (output, query, key, value).
    pack_backward: Callable[[tuple[Tensor | None, ...], tuple[Tensor, ...]], Packed]
    differentiable_backward: Callable[..., tuple[Tensor, ...]]
    backward: dict[Hashable, Packed] = field(default_factory=dict)  # by what is known of grad_out

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_strided(self.shapes[3], self.strides[3], dtype=query.dtype)
        self.forward(query, key, value, out, mask)
        return out

    def gradients(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Those of query, key and value; the caller knows that nobody has to see or differentiate this."""
        stride, dtype = grad_out.stride(), query.dtype
        if grad_out.dtype != dtype or stride[-1] != 1 or type(grad_out) is not Tensor:
            return self.differentiable_backward(grad_out, query, key, value, mask, *self.options)
        inputs = query, key, value, mask
        gradients = tuple(torch.empty_strided(self.shapes[i], self.strides[i], dtype=dtype) for i in range(3))
        known = stride, torch.get_num_threads()
        packed = self.backward.get(known)
        if packed is None:
            packed = self.backward[known] = self.pack_backward(inputs, (grad_out, *gradients))
        packed(*inputs, grad_out, *gradients)
        return gradients


class _WithGradient(torch.autograd.Function):
    """What the operator's registered gradient does, with less around it."""

    @staticmethod
    def forward(ctx: Any, call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(query, key, value, mask)
        return call(query, key, value, mask)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        if torch.is_grad_enabled() or _observed() or grad_out.is_neg():
            gradients = call.differentiable_backward(grad_out, *ctx.saved_tensors, *call.options)
        else:
            gradients = call.gradients(grad_out, *ctx.saved_tensors)
        return None, *gradients, None


_calls: dict[Hashable, Call] = {}


def signature(
    name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: tuple[Any, ...]
) -> Hashable | None:
    """All that a call depends on except the numbers in its tensors; None if it has to take the long way, because
    autocast has something to cast or a transform, a mode, a tracer or a profiler wants to know of it."""
    if _observed():
        return None
    for t in (query, key, value) if mask is None else (query, key, value, mask):
        if type(t) is not Tensor or not t.is_cpu or t.is_neg():
            return None
    if torch.is_autocast_enabled("cpu") and {query.dtype, key.dtype, value.dtype} != {torch.get_autocast_dtype("cpu")}:
        return None
    known = (
        name, options, torch.get_num_threads(), query.shape, query.stride(), query.dtype, key.shape, key.stride(),
        key.dtype, value.shape, value.stride(), value.dtype,
    )  # fmt: skip
    return known if mask is None else (*known, mask.shape, mask.stride(), mask.dtype)


def _observed() -> bool:
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def keep(signature: Hashable, call: Call) -> None:
    if len(_calls) >= _MOST:
        _calls.clear()
    _calls[signature] = call


def run(signature: Hashable, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor | None:
    """The result of a call that was kept, or None if there is none."""
    try:
        call = _calls.get(signature)
    except TypeError:  # an option that is a list, say: the checks have a sentence for it
        return None
    if call is None:
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _WithGradient.apply(call, query, key, value, mask)
    return call(query, key, value, mask)
