"""What the operators check of their arguments, and the rules of masks and lengths they share."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def autocast_inputs(*tensors: Any) -> tuple[Any, ...]:
    """The inputs in autocast's type where it is on, as `scaled_dot_product_attention` casts its own: projections come
    out in that type and norms in float32, and an operator takes both."""
    device = _device_type(tensors)
    if device is None or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def without_autocast(*tensors: Any) -> contextlib.AbstractContextManager:
    """Autocast off for a computation that chooses its types itself."""
    device = _device_type(tensors)
    if device is None or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _device_type(tensors: tuple[Any, ...]) -> str | None:
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else None
    if device is None or device in ("cpu", "cuda"):  # the question cannot be traced in PyTorch 2.6
        return device
    return device if torch.amp.is_autocast_available(device) else None


def check_qkv(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool | None = None) -> None:
    """Raise `ValueError` unless query is [B, H, Nq, D], key [B, Hkv, Nk, D] and value [B, Hkv, Nk, Dv], one dtype.

    H may be a multiple of Hkv if `enable_gqa`; None: the operator has no grouped queries.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; it must be a tensor of shape [B, H, N, D].")
        check_layout(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must have 4 dimensions, [B, H, N, D].")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; it must be float64, float32, bfloat16 or float16.")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value have dtypes {query.dtype}, {key.dtype} and {value.dtype}; they must be the same."
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query, key and value are on {query.device}, {key.device} and {value.device}; move them to one device."
        )
    b, h, _, d = query.shape
    if key.shape[0] != b or value.shape[0] != b:
        raise ValueError(
            f"query, key and value have batch sizes {b}, {key.shape[0]} and {value.shape[0]}; they must be the same."
        )
    if key.shape[3] != d or d == 0:
        raise ValueError(f"query and key have head sizes {d} and {key.shape[3]}; they must be the same and above 0.")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(f"key has shape {list(key.shape)}, value {list(value.shape)}; heads and tokens must agree.")
    if key.shape[1] != h and not enable_gqa:
        remedy = "they must be the same" if enable_gqa is None else "pass enable_gqa=True for grouped queries"
        raise ValueError(f"query has {h} heads, key {key.shape[1]}; {remedy}.")
    if key.shape[1] != h and (key.shape[1] == 0 or h % key.shape[1]):
        raise ValueError(f"query has {h} heads, key {key.shape[1]}; the first must be a multiple of the second.")


def check_layout(name: str, x: Tensor) -> None:
    """Raise `ValueError` for a tensor whose numbers do not lie in memory by strides: sparse, mkldnn's, nested."""
    if x.layout != torch.strided:
        dense = "to_padded_tensor(0.0) and a mask" if x.is_nested else "to_dense()"
        raise ValueError(f"{name} has layout {x.layout}; it must be dense, torch.strided: use {dense}.")


def check_beside(name: str, x: Tensor, query: Tensor) -> None:
    """Raise `ValueError` unless a mask, say, is dense and on query's device."""
    check_layout(name, x)
    if x.device != query.device:
        raise ValueError(f"query is on {query.device} and {name} on {x.device}; move them to one device.")


def check_number(name: str, value: Any, *, low: float = -math.inf, below: float = math.inf) -> None:
    """Raise `ValueError` unless low <= value < below; numbers that torch.compile traces count as numbers.

    Types stand in tuples here and in the operators: PyTorch 2.6 cannot trace a union.
    """
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be a number.")
    if not low <= value < below or abs(value) == math.inf:  # torch.compile cannot trace math.isinf
        limits = "finite" if low == -math.inf else f"finite and {low:g} or more"
        raise ValueError(
            f"{name} is {value}; it must be {limits if below == math.inf else f'{low:g} or more and below {below:g}'}."
        )


def check_scores(is_causal: bool, scale: float | None) -> None:
    """Raise `ValueError` unless `is_causal` is one of two and `scale` None or a finite number."""
    if is_causal not in (True, False):
        raise ValueError(f"is_causal is {is_causal!r}; it must be True or False.")
    if scale is not None:
        check_number("scale", scale)


def check_attn_mask(attn_mask: Tensor | None, query: Tensor, key: Tensor, *, additive: bool = False) -> None:
    """Raise `ValueError` unless the mask is boolean, or with `additive` of query's dtype, and broadcasts to
    [B, H, Nq, Nk]."""
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor):
        raise ValueError(f"attn_mask is a {type(attn_mask).__name__}; pass a boolean tensor, True = attend.")
    if additive and attn_mask.dtype not in (torch.bool, query.dtype):
        raise ValueError(
            f"attn_mask has dtype {attn_mask.dtype}; pass a boolean mask, True = attend, or an additive one of "
            f"{query.dtype}."
        )
    if not additive and attn_mask.dtype != torch.bool:
        raise ValueError(
            f"attn_mask has dtype {attn_mask.dtype}; without a softmax an additive mask has no meaning. "
            "Pass a boolean mask, True = attend."
        )
    check_beside("attn_mask", attn_mask, query)
    target = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    try:
        fits = torch.broadcast_shapes(attn_mask.shape, target) == torch.Size(target)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"attn_mask has shape {list(attn_mask.shape)}; it must broadcast to {list(target)}.")


def visible_mask(attn_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """The boolean mask of the keys each query may see, [..., Nq, Nk] and broadcastable, or None for all.

    Causal is aligned at the top left, as in `scaled_dot_product_attention`: query i sees keys 0 to i.
    """
    if not is_causal:
        return attn_mask
    causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return causal if attn_mask is None else attn_mask & causal


def softmax_mask(attn_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> tuple[Tensor | None, bool]:
    """A boolean or additive mask and `is_causal` as `scaled_dot_product_attention` takes them: not both, and no mask of
    fewer than two dimensions."""
    if attn_mask is None:
        return None, is_causal
    if is_causal:
        causal = visible_mask(None, True, query, key)
        assert causal is not None
        boolean = attn_mask.dtype == torch.bool
        attn_mask = attn_mask & causal if boolean else attn_mask.masked_fill(~causal, float("-inf"))
    return torch.atleast_2d(attn_mask), False


def visible_length(mask: Tensor | None, key: Tensor) -> Tensor | int:
    """Number of visible keys of each row, [..., Nq, 1], at least 1 so that rows without any give 0 and not 0/0."""
    if mask is None:
        return max(key.shape[2], 1)
    return mask.expand(*mask.shape[:-1], key.shape[2]).sum(-1, keepdim=True).clamp(min=1)


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, Hkv, N, D] -> [B, num_heads, N, D]: each key/value head serves num_heads / Hkv query heads in a row."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)
