"""Calls like an earlier one go straight to the kernel.

Checks, dispatch and packing take longer than a kernel needs for a short sequence, and a model makes the same call over
and over. What one call found is kept here under all that it depends on: shapes, strides, types, options and the number
of threads. A later call that agrees in these, and that only the kernel has to see, changes the addresses and runs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_ADDRESS = struct.Struct("@P")
_MOST = 1024  # calls are kept, then all are forgotten


@dataclass(frozen=True, slots=True)
class Call:
    """A kernel with its packed arguments, and its gradient."""

    kernel: Callable[[bytes], int]
    arguments: bytes
    addresses: tuple[int, ...]  # where in the arguments those of query, key, value, output and mask stand
    shape: tuple[int, ...]  # of the output
    stride: tuple[int, ...]
    options: tuple[Any, ...]  # what both gradients take after grad_out, query, key, value and mask
    backward: Callable[..., tuple[Tensor, ...]]
    differentiable_backward: Callable[..., tuple[Tensor, ...]]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_strided(self.shape, self.stride, dtype=query.dtype)
        arguments = bytearray(self.arguments)
        for place, t in zip(self.addresses, (query, key, value, out, mask), strict=True):
            if t is not None:
                _ADDRESS.pack_into(arguments, place, t.data_ptr())
        if self.kernel(bytes(arguments)):
            raise MemoryError("The attention kernels could not allocate their working memory.")
        return out


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
        short = not (torch.is_grad_enabled() or _observed() or grad_out.is_neg())
        function = call.backward if short else call.differentiable_backward
        return None, *function(grad_out, *ctx.saved_tensors, *call.options), None


_calls: dict[Hashable, Call] = {}


def signature(
    name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *options: Any
) -> Hashable | None:
    """All that a call depends on except the numbers in its tensors; None if it has to take the long way, because
    autocast has something to cast or a transform, a mode, a tracer or a profiler wants to know of it."""
    if _observed():
        return None
    parts: list[Any] = [name, torch.get_num_threads(), *options]
    for t in (query, key, value) if mask is None else (query, key, value, mask):
        if type(t) is not Tensor or not t.is_cpu or t.is_neg():
            return None
        parts += (t.shape, t.stride(), t.dtype)
    if torch.is_autocast_enabled("cpu") and {query.dtype, key.dtype, value.dtype} != {torch.get_autocast_dtype("cpu")}:
        return None
    try:
        hash(found := tuple(parts))
    except TypeError:  # an option that is a list, say: the checks have a sentence for it
        return None
    return found


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
    call = _calls.get(signature)
    if call is None:
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _WithGradient.apply(call, query, key, value, mask)
    return call(query, key, value, mask)
