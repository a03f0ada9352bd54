"""The CPU kernels of native/, called by PyTorch's operators of `formix.ops.operators` and, past these, by calls that
repeat an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from formix.ops import repeated
from formix.ops.native_library import (
    L1,
    POINTWISE,
    Structure,
    available,
    isas,
    library,
    set_isa,
)
from formix.ops.operators import TYPES, cannot_take, dense, empty
from formix.ops.operators import library as operators

__all__ = [
    "available",
    "cannot_run",
    "isas",
    "l1_attention",
    "pointwise_attention",
    "set_isa",
]

_TYPES = {dtype: number for number, dtype in enumerate(TYPES)}  # FormixType
_ACTIVATIONS = {  # FormixActivation
    name: number
    for number, name in enumerate(
        ("relu", "relu2", "gelu", "gelu_erf", "softplus", "identity", "relu6", "sigmoid", "sigmoid_bias")
    )
}
_NO_TENSOR, _NO_MASK = (0,) * 4, (0,) * 5


_USABLE = available()  # once and here: torch.compile cannot trace the search for the library


def cannot_run(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, or None if they can."""
    usable, reason = _USABLE
    if not usable:
        return reason
    if query.device.type != "cpu":
        return f"query is on {query.device}, and the kernels run on the CPU"
    return cannot_take(query, key, value)


def pointwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    activation: str = "relu",
    length_exponent: float = 1.0,
    length: int | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    signature: Hashable | None = None,
) -> Tensor:
    """O = L^-a h(Q K^T scale) V (arXiv 2309.08586); see `formix.ops.pointwise_attention`.

    `enable_gqa` changes nothing here: the heads of query and key say it. With "sigmoid_bias", a is 0 as a rule.
    Under `signature` the call is kept for the next one like it.

    Returns:
        [B, H, Nq, Dv], in memory [B, Nq, H, Dv]: transposing and joining the heads copies nothing.
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    inputs = (query, key, value, attn_mask, activation, float(length_exponent), length, is_causal, float(scale))
    out = torch.ops.formix.pointwise_attention(*inputs)
    if signature is not None and out.numel() and value.shape[2]:
        kernels = library().formix_pointwise_forward, library().formix_pointwise_backward
        backward = torch.ops.formix.pointwise_attention_backward
        _keep(signature, out, inputs[:4], inputs[4:], kernels, POINTWISE, _pointwise_arguments, backward)
    return out


def l1_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    eps: float = 1e-12,
    signature: Hashable | None = None,
) -> Tensor:
    """O = Q diag(c) K^T V, c_j = 1 / (max(|q_:j|_1, eps) max(|k_:j|_1, eps)) (SimA, arXiv 2206.08898); see
    `formix.ops.l1_attention`. Under `signature` the call is kept for the next one like it.

    Returns:
        [B, H, Nq, Dv], in memory [B, Nq, H, Dv].
    """
    out = torch.ops.formix.l1_attention(query, key, value, key_padding_mask, eps)
    if signature is not None and out.numel():
        kernels = library().formix_l1_forward, library().formix_l1_backward
        backward = torch.ops.formix.l1_attention_backward
        _keep(signature, out, (query, key, value, key_padding_mask), (eps,), kernels, L1, _l1_arguments, backward)
    return out


# ---------------------------------------------------------------------------------------------- calling the kernels


def _tensor(t: Tensor) -> tuple[int, int, int, int]:
    b, h, n, _ = t.stride()
    return t.data_ptr(), b, h, n


def _keep(
    signature: Hashable,
    out: Tensor,
    inputs: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    kernels: tuple[Callable[[int], int], Callable[[int], int]],
    structure: Structure,
    arguments: Callable[..., bytes],
    differentiable_backward: Callable[..., tuple[Tensor, ...]],
) -> None:
    """Keeps a call with these inputs (query, key, value, mask), options and result for those like it."""
    addresses = structure.addresses

    def pack_backward(inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...]) -> repeated.Packed:
        packed = arguments([None, *gradients], *inputs, *options)
        return repeated.Packed(kernels[1], packed, (*addresses[:3], *addresses[4:]))

    qkv = [t for t in inputs[:3] if t is not None]
    gradient = repeated.Gradient(
        shapes=tuple(tuple(t.shape) for t in qkv),
        strides=tuple(empty(t, t.shape).stride() for t in qkv),
        options=options,
        pack=pack_backward,
        differentiable=differentiable_backward,
    )
    packed = arguments([out, None, None, None, None], *inputs, *options)
    places = (*addresses[:3], addresses[4], addresses[3])
    repeated.keep(signature, (*inputs, out), kernels[0], packed, places, gradient)


def _call(function: Callable[[bytes], int], arguments: bytes) -> None:
    if function(arguments):
        raise MemoryError("The attention kernels could not allocate their working memory.")


def _pointwise_arguments(
    tensors: list[Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    activation: str,
    length_exponent: float,
    length: int | None,
    is_causal: bool,
    scale: float,
) -> bytes:
    b, h, n_q, d = query.shape
    h_kv, n_k, d_v = value.shape[1:]
    mask: tuple[int, ...] = _NO_MASK
    if attn_mask is not None:
        expanded = attn_mask.expand(b, h, n_q, n_k)
        mask = (attn_mask.data_ptr(), *expanded.stride())
    out, *gradients = ((_NO_TENSOR if t is None else _tensor(t)) for t in tensors)
    return POINTWISE.struct.pack(
        *(b, h, h_kv, n_q, n_k, d, d_v),
        *(_TYPES[query.dtype], _ACTIVATIONS[activation], is_causal, torch.get_num_threads()),
        *(-1 if length is None else length, scale, length_exponent),
        *(*_tensor(query), *_tensor(key), *_tensor(value), *out, *mask),
        *(number for gradient in gradients for number in gradient),
    )


def _pointwise_cpu(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    query, key, value = dense(query, key, value)
    out = empty(query, (*query.shape[:3], value.shape[-1]))
    if value.shape[2] == 0:
        return out.zero_()
    if out.numel():
        arguments = _pointwise_arguments([out, None, None, None, None], query, key, value, *options)
        _call(library().formix_pointwise_forward, arguments)
    return out


def _pointwise_backward_cpu(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = [empty(t, t.shape) for t in (query, key, value)]
    if query.numel() and value.numel():
        grad_out, query, key, value = dense(grad_out.to(query.dtype), query, key, value)  # must outlive the call
        arguments = _pointwise_arguments([None, grad_out, *gradients], query, key, value, *options)
        _call(library().formix_pointwise_backward, arguments)
    else:
        for gradient in gradients:
            gradient.zero_()
    return gradients[0], gradients[1], gradients[2]


def _l1_arguments(
    tensors: list[Tensor | None], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, eps: float
) -> bytes:
    b, h, n_q, d = query.shape
    n_k, d_v = value.shape[2:]
    strides: tuple[int, ...] = _NO_MASK
    if mask is not None:
        by_batch, by_token = mask.expand(b, n_k).stride()
        strides = (mask.data_ptr(), by_batch, 0, 0, by_token)
    out, *gradients = ((_NO_TENSOR if t is None else _tensor(t)) for t in tensors)
    return L1.struct.pack(
        *(b, h, n_q, n_k, d, d_v, _TYPES[query.dtype], torch.get_num_threads(), eps),
        *(*_tensor(query), *_tensor(key), *_tensor(value), *out, *strides, mask is not None and n_q == n_k),
        *(number for gradient in gradients for number in gradient),
    )


def _l1_cpu(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, eps: float) -> Tensor:
    query, key, value = dense(query, key, value)
    out = empty(query, (*query.shape[:3], value.shape[-1]))
    if out.numel():
        tensors = [out, None, None, None, None]
        _call(library().formix_l1_forward, _l1_arguments(tensors, query, key, value, key_padding_mask, eps))
    return out


def _l1_backward_cpu(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = [empty(t, t.shape) for t in (query, key, value)]
    if query.numel() and value.numel():
        grad_out, query, key, value = dense(grad_out.to(query.dtype), query, key, value)
        tensors = [None, grad_out, *gradients]
        _call(library().formix_l1_backward, _l1_arguments(tensors, query, key, value, key_padding_mask, eps))
    else:
        for gradient in gradients:
            gradient.zero_()
    return gradients[0], gradients[1], gradients[2]


for _name, _kernel in (
    ("pointwise_attention", _pointwise_cpu),
    ("pointwise_attention_backward", _pointwise_backward_cpu),
    ("l1_attention", _l1_cpu),
    ("l1_attention_backward", _l1_backward_cpu),
):
    operators.impl(_name, _kernel, "CPU")
