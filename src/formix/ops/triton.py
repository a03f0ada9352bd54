"""The Triton kernels of triton_pointwise.py and triton_l1.py, called by PyTorch's operators of `formix.ops.operators`.

They run on GPUs that PyTorch calls CUDA (NVIDIA's, and AMD's under ROCm); Triton itself is imported when the first one
does. With TRITON_INTERPRET=1 in the environment they run on CPU tensors too, in Triton's interpreter, for tests and
debugging. That is how they were verified (bfloat16 in float32, as the interpreter has no products of it) besides being
compiled for GPUs: they have not run on one, nor been timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from formix.ops.operators import cannot_take, define, library

_FOUND = importlib.util.find_spec("triton") is not None  # once and here: torch.compile cannot trace the search
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LEAST = 8, 0  # compute capability from which NVIDIA's GPUs have bfloat16 and tf32, and Triton supports them


def available() -> tuple[bool, str]:
    """(True, the device they run on), or (False, the reason in one sentence)."""
    if not _FOUND:
        return False, "Triton is not installed (pip install triton)"
    if INTERPRETED:
        return True, "Triton's interpreter (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return False, "no CUDA device here"
    reason = _too_old(None)
    return (True, torch.cuda.get_device_name()) if reason is None else (False, reason)


def _too_old(device: int | None) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or capability >= LEAST:
        return None
    return "the GPU has compute capability {}.{}, and the kernels need {}.{}".format(*capability, *LEAST)


# What torch.compiler.assume_constant_result sets; the function itself would import Dynamo here.
_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cannot_run(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, or None if they can."""
    if not _FOUND or not (query.is_cuda or INTERPRETED):
        usable, reason = available()
        return f"query is on {query.device}, and the kernels run on GPUs" if usable else reason
    if query.is_cuda and not INTERPRETED and (old := _too_old(query.device.index)) is not None:
        return old
    return cannot_take(query, key, value)


def pointwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    activation: str,
    length_exponent: float,
    length: int | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """O = L^-a h(Q K^T scale) V (arXiv 2309.08586); see `formix.ops.pointwise_attention`.

    Returns:
        [B, H, Nq, Dv], in memory [B, Nq, H, Dv].
    """
    attention = _operators(query).pointwise_attention
    return attention(query, key, value, attn_mask, activation, length_exponent, length, is_causal, scale)


def l1_attention(query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None, eps: float) -> Tensor:
    """O = Q diag(c) K^T V (SimA, arXiv 2206.08898); see `formix.ops.l1_attention`.

    Returns:
        [B, H, Nq, Dv], in memory [B, Nq, H, Dv].
    """
    return _operators(query).l1_attention(query, key, value, key_padding_mask, eps)


def _operators(query: Tensor) -> Any:
    return torch.ops.formix if query.is_cuda else torch.ops.formix_interpreted


def _kernel(module: str, function: str) -> Any:
    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"formix.ops.{module}"), function)(*arguments)

    return call


def _interpreted_kernel(module: str, function: str) -> Any:
    """bfloat16 goes through float32, for the interpreter multiplies its bits as integers."""
    kernel = _kernel(module, function)

    def call(*arguments: Any) -> Any:
        if arguments[0].dtype != torch.bfloat16:
            return kernel(*arguments)
        wide = [x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in arguments]
        result = kernel(*wide)
        return result.bfloat16() if isinstance(result, Tensor) else tuple(x.bfloat16() for x in result)

    return call


# On the CPU formix::pointwise_attention is native's, so that the interpreter has operators of its own.
_interpreted = define("formix_interpreted") if INTERPRETED else None
for _module, _name in (("triton_pointwise", "pointwise_attention"), ("triton_l1", "l1_attention")):
    for _operator, _function in ((_name, "forward"), (f"{_name}_backward", "backward")):
        library.impl(_operator, _kernel(_module, _function), "CUDA")
        if _interpreted is not None:
            _interpreted.impl(_operator, _interpreted_kernel(_module, _function), "CPU")
