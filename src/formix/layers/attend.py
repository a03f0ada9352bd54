"""From a mixer's description to its operator: the one place where every model asks for attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from formix.design import Mixer, Pointwise, Sima, Softmax
from formix.ops import l1_attention, pointwise_attention
from formix.ops.masks import repeat_heads, softmax_mask, visible_mask
from formix.ops.registry import is_portable

# mixer, query, key, and if there are: the boolean mask of visible pairs, the bias of the scores
Watcher = Callable[[Mixer, Tensor, Tensor, Tensor | None, Tensor | None], None]
_watchers: list[Watcher] = []


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside, `watcher` sees what goes into every `attend`, for diagnostics."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def attend(
    mixer: Mixer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """The mixer's output for [B, H, N, D] query and [B, Hkv, N, D] key and value, as [B, H, N, D].

    A bias B of the scores, `attn_bias` broadcastable to [B, H, Nq, Nk] (relative positions, without a mask), enters as

        softmax     softmax(Q K^T / sqrt(d) + B) V
        pointwise   L^-a h(Q K^T / sqrt(d) + B) V
        SimA        Q^ (K^^T V) + B V / Nk: outside the norms, which are of Q and K alone. SimA has no function of the
                    scores that B could shift; divided by the number of keys its part is a mean of values, as in
                    pointwise attention with h = identity. It costs a product of Nq Nk D per head: SimA is then no
                    longer linear in the tokens.

    Masks are boolean, True = attend (softmax also takes additive ones). Dropout is of attention weights; SimA,
    which has none in its linear form, ignores it as its official code does.

    Raises:
        ValueError: a mask that the mixer cannot have, or a causal SimA.
    """
    assert attn_bias is None or (attn_mask is None and not is_causal), "no model has both"
    grouped = bool(query.shape[1] != key.shape[1])  # torch.jit.trace makes tensors of sizes
    for watcher in _watchers:
        boolean = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask > float("-inf")
        watcher(mixer, query, key, visible_mask(boolean, is_causal, query, key), attn_bias)
    if isinstance(mixer, Softmax):  # no match: PyTorch 2.6 cannot trace its patterns
        attn_mask, is_causal = softmax_mask(attn_mask, is_causal, query, key)
        if is_portable():
            return _portable_softmax(query, key, value, attn_mask, attn_bias, is_causal, dropout_p, scale)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask if attn_bias is None else attn_bias, dropout_p=dropout_p,
            is_causal=is_causal, scale=scale, enable_gqa=grouped,
        )  # fmt: skip
    if isinstance(mixer, Pointwise):
        length = None if mixer.length == "visible" else key.shape[2] if mixer.length == "keys" else mixer.length
        return pointwise_attention(
            query, key, value, activation=mixer.activation, length_exponent=mixer.length_exponent, length=length,
            attn_mask=attn_mask, attn_bias=attn_bias, is_causal=is_causal, scale=scale, enable_gqa=grouped,
            dropout_p=dropout_p,
        )  # fmt: skip
    assert isinstance(mixer, Sima), "a gated unit has no queries and keys"
    if is_causal:
        raise ValueError("SimA cannot be causal: its l1 norms run over all tokens and would see the future.")
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    padding = None if attn_mask is None else key_padding(attn_mask, query.shape[0], key.shape[2])
    out = l1_attention(query, key, value, key_padding_mask=padding, eps=mixer.eps)
    return out if attn_bias is None else out + (attn_bias / key.shape[2]).to(value) @ value


def _portable_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    attn_bias: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    """Softmax attention as runtimes other than PyTorch understand it: every query head with a key head of its own, and
    0 spelt out for rows that see no key, which elsewhere are a mean of all values, or not a number. The mask has a row
    for every query, without which ONNX Runtime refuses the Attention of opset 23.

    That 0 is put into [B, N, H, D]: OpenVINO 2026.4 makes one kernel of attention and what directly follows it, which
    gives wrong numbers for heads of 128 or 256."""
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    sees = None
    if attn_mask is not None:
        visible = attn_mask if attn_mask.dtype == torch.bool else attn_mask > float("-inf")
        sees = visible.any(-1, keepdim=True)  # [..., Nq, 1]
        attn_mask = attn_mask | ~sees if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~sees, 0.0)
        attn_mask = attn_mask.expand(*attn_mask.shape[:-2], query.shape[2], -1)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask if attn_bias is None else attn_bias, dropout_p=dropout_p,
        is_causal=is_causal, scale=scale,
    )  # fmt: skip
    if sees is None:
        return out
    sees = sees[(None,) * (4 - sees.dim())]  # [B, H, Nq, 1], or 1 for B and H
    return out.transpose(1, 2).masked_fill(~sees.transpose(1, 2), 0.0).transpose(1, 2)


def key_padding(attn_mask: Tensor, batch: int, num_keys: int) -> Tensor:
    """[B, N] padding mask out of an attention mask [B or 1, 1, 1, N], [1, N] or [N].

    Two dimensions are [queries, keys] here as everywhere, so a batch's padding mask needs its four.

    Raises:
        ValueError: the mask is not boolean or differs between heads or queries, which SimA's norms cannot express.
    """
    if attn_mask.dtype != torch.bool:
        raise ValueError(f"attn_mask has dtype {attn_mask.dtype}; SimA takes a boolean mask, True = attend.")
    flat = attn_mask[:, 0, 0] if attn_mask.dim() == 4 and attn_mask.shape[1:3] == (1, 1) else attn_mask
    rows = (1, batch) if attn_mask.dim() == 4 else (1,)
    if flat.dim() not in (1, 2) or flat.shape[-1] != num_keys or (flat.dim() == 2 and flat.shape[0] not in rows):
        raise ValueError(
            f"attn_mask has shape {list(attn_mask.shape)}; SimA normalises over all tokens and can leave out padding "
            f"only: pass a mask of keys, [B, 1, 1, {num_keys}] or [{num_keys}]."
        )
    return flat.expand(batch, num_keys)
