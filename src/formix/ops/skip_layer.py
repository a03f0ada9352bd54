"""Skip-layer attention: some heads read the keys and values of an earlier layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formix.ops.masks import (
    autocast_inputs,
    check_attn_mask,
    check_layout,
    check_number,
    check_qkv,
    check_scores,
    softmax_mask,
)
from formix.ops.pointwise import pointwise_attention

MIXERS = ("softmax", "pointwise")
POINTWISE = ("activation", "length_exponent", "length")


def skip_layer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    source_key: Tensor,
    source_value: Tensor,
    *,
    skip_heads: int | Sequence[int],
    mixer: str = "softmax",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    impl: str = "auto",
    **pointwise: Any,
) -> Tensor:
    """O_i = attention(Q_i, K~_i, V~_i), with K~_i, V~_i the source layer's for heads i in `skip_heads` and this
    layer's own otherwise ("Skip-Layer Attention", arXiv 2406.11274; the head split is our reading of it).

    Args:
        query: [B, H, Nq, D]; key, value, source_key, source_value: [B, Hkv, Nk, D], the projections of this layer
            and of the source layer.
        skip_heads: the key/value heads that read the source: a number n for the first n, or their numbers.
        mixer: "softmax" (`scaled_dot_product_attention`) or "pointwise" (`pointwise_attention`).
        attn_mask, is_causal, dropout_p, scale, enable_gqa, impl: as the mixer has them; a boolean mask may come with
            is_causal.
        **pointwise: activation, length_exponent, length of the pointwise mixer.

    Returns:
        [B, H, Nq, D].

    Raises:
        ValueError: source shapes that differ from key's, head numbers out of range, an unknown mixer or option.
    """
    query, key, value, source_key, source_value = autocast_inputs(query, key, value, source_key, source_value)
    check_qkv(query, key, value, enable_gqa=enable_gqa)
    if mixer not in MIXERS:
        raise ValueError(f"mixer is {mixer!r}; it must be one of {', '.join(map(repr, MIXERS))}.")
    key, value = select_heads(key, source_key, skip_heads), select_heads(value, source_value, skip_heads)
    if unknown := [name for name in pointwise if name not in POINTWISE]:
        raise ValueError(f"{', '.join(map(repr, unknown))} is no option; mixer='pointwise' has {', '.join(POINTWISE)}.")
    if mixer == "pointwise":
        return pointwise_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            dropout_p=dropout_p,
            scale=scale,
            enable_gqa=enable_gqa,
            impl=impl,
            **pointwise,
        )
    if pointwise:
        raise ValueError(f"{', '.join(map(repr, pointwise))}: options of mixer='pointwise', not of 'softmax'.")
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl={impl!r} cannot run softmax, which is PyTorch's own; use impl='auto'.")
    check_attn_mask(attn_mask, query, key, additive=True)
    check_scores(is_causal, scale)
    check_number("dropout_p", dropout_p, low=0, below=1)
    attn_mask, is_causal = softmax_mask(attn_mask, bool(is_causal), query, key)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, dropout_p=dropout_p, scale=scale,
        enable_gqa=enable_gqa,
    )  # fmt: skip


def select_heads(own: Tensor, source: Tensor, skip_heads: int | Sequence[int]) -> Tensor:
    """`own` [B, Hkv, N, D] with the given heads (the first n, or by number) replaced by `source`'s."""
    if (
        not isinstance(source, Tensor)
        or own.shape != source.shape
        or own.dtype != source.dtype
        or own.device != source.device
    ):
        ours, theirs = (
            f"{list(t.shape)} in {t.dtype} on {t.device}" if isinstance(t, Tensor) else repr(t) for t in (own, source)
        )
        raise ValueError(f"This layer's keys or values are {ours}, the source layer's {theirs}; they must agree.")
    check_layout("The source layer's keys or values", source)
    h = own.shape[1]
    heads = _heads(skip_heads)
    out_of_range = (isinstance(skip_heads, int) and skip_heads < 0) or any(i not in range(h) for i in heads)
    if out_of_range or len(set(heads)) != len(heads):
        raise ValueError(f"skip_heads is {skip_heads!r}; it must name different heads from 0 to {h - 1}.")
    n = len(heads)
    if n == 0:
        return own
    if n == h:
        return source
    if heads == tuple(range(n)):
        return torch.cat([source[:, :n], own[:, n:]], dim=1)
    replaced = set(heads)
    return torch.stack([(source if i in replaced else own)[:, i] for i in range(h)], dim=1)


def _heads(skip_heads: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(skip_heads, int) and not isinstance(skip_heads, bool):
        return tuple(range(skip_heads))
    if isinstance(skip_heads, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in skip_heads):
        return tuple(skip_heads)
    raise ValueError(f"skip_heads is {skip_heads!r}; it must be a number of heads or a list of their numbers.")
