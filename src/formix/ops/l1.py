"""SimA: attention with l1-normalised queries and keys, and no softmax."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from formix.ops import repeated, triton
from formix.ops.masks import autocast_inputs, check_beside, check_number, check_qkv, without_autocast
from formix.ops.registry import NO_KERNELS, choose, native_module

ORDERS = ("auto", "qk_v", "q_kv", "fused")


def l1_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    order: str = "auto",
    eps: float = 1e-12,
    impl: str = "auto",
) -> Tensor:
    """O = Q^ K^^T V with Q^ = Q / max(||Q||_1, eps) and K^ likewise, the norms over the tokens, one for every
    channel of every head ("SimA: Simple Softmax-free Attention for Vision Transformers", arXiv 2206.08898, eq. 4).

    There is no scale and no causal form: the norms run over all tokens.

    Args:
        query: [B, H, Nq, D]; key: [B, H, Nk, D]; value: [B, H, Nk, Dv]; any strides.
        key_padding_mask: boolean [B, Nk], True = a token, False = padding. Padding counts in no norm and no sum;
            in self-attention (Nq = Nk) the padded queries are left out too and give 0, so that the result on the
            tokens is that of the unpadded input.
        order: "qk_v" forms the Nq x Nk weights; "q_kv" the D x Dv product K^^T V; "fused" is the second with both
            norms folded into one factor per channel, Q diag(c) (K^T V); "auto" takes "fused", and in the reference
            "qk_v" when it is the cheaper one (few tokens, wide heads). They differ by rounding only.
        eps: lower bound of every norm; a channel of zeros stays zero. A norm above float32's range (3.4e38) is
            infinite there, and its channel adds nothing.
        impl: "auto", "reference", "native" or "triton". The kernels know the fused order only.

    Returns:
        [B, H, Nq, Dv] in query's dtype; norms and the fused order are computed in float32 for 16-bit inputs.

    Raises:
        ValueError: shapes, dtypes, a float mask, an unknown order, or an `impl` that cannot run this call.
    """
    signature = repeated.signature(
        "l1_attention", query, key, value, key_padding_mask, (order, eps, eps.__class__, impl)
    )
    if signature is not None and (out := repeated.run(signature, query, key, value, key_padding_mask)) is not None:
        return out
    query, key, value = autocast_inputs(query, key, value)
    check_qkv(query, key, value)
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; it must be one of {', '.join(map(repr, ORDERS))}.")
    check_number("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps is {eps}; it must be above 0.")
    _check_padding(key_padding_mask, key)

    def refusal(impl: str) -> str | None:
        kernels = triton if impl == "triton" else native_module()
        if kernels is None:
            return NO_KERNELS
        if order in ("qk_v", "q_kv"):
            return f"the kernels know the fused order only, not {order!r}"
        if eps < 1e-18:
            return f"eps is {eps}, and the kernels' factor 1 / eps^2 must not leave float32's range (eps >= 1e-18)"
        return kernels.cannot_run(query, key, value)

    chosen = choose("l1_attention", impl, query.device, refusal)
    if chosen == "native":
        options = {"key_padding_mask": key_padding_mask, "eps": eps, "signature": signature}
        return native_module().l1_attention(query, key, value, **options)  # type: ignore[union-attr]
    if chosen == "triton":
        return triton.l1_attention(query, key, value, key_padding_mask=key_padding_mask, eps=eps)
    if order == "auto":
        order = choose_order(query, key, value)
    with without_autocast(query):
        return _reference(query, key, value, key_padding_mask, order, eps)


def choose_order(query: Tensor, key: Tensor, value: Tensor) -> Literal["qk_v", "fused"]:
    """The order with fewer products: Nq Nk (D + Dv) against (Nq + Nk) D Dv; for Nq = Nk and D = Dv, N < D. A program
    traced for any number of tokens has one order for all, "fused"."""
    n_q, n_k, d, d_v = query.shape[2], key.shape[2], query.shape[3], value.shape[3]
    if isinstance(n_q, torch.SymInt) or isinstance(n_k, torch.SymInt):
        return "fused"
    return "qk_v" if n_q * n_k * (d + d_v) < (n_q + n_k) * d * d_v else "fused"


def _reference(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, order: str, eps: float) -> Tensor:
    dtype = q.dtype
    if padding is not None:
        token = padding[:, None, :, None]  # [B, 1, Nk, 1]
        k, v = k.masked_fill(~token, 0.0), v.masked_fill(~token, 0.0)
        if q.shape[2] == k.shape[2]:
            q = q.masked_fill(~token, 0.0)
    compute = torch.promote_types(dtype, torch.float32)
    q, k = q.to(compute), k.to(compute)  # once: the two parts of a gradient are then added in float32 too
    c_q = 1 / q.abs().sum(-2, keepdim=True).clamp(min=eps)  # [B, H, 1, D]
    c_k = 1 / k.abs().sum(-2, keepdim=True).clamp(min=eps)
    if order == "fused":
        k_v = (k * c_k).transpose(-2, -1) @ v.to(compute)  # [B, H, D, Dv]; large keys do not overflow
        return (q @ (c_q.transpose(-2, -1) * k_v)).to(dtype)
    q, k = (q * c_q).to(dtype), (k * c_k).to(dtype)
    return (q @ k.transpose(-2, -1)) @ v if order == "qk_v" else q @ (k.transpose(-2, -1) @ v)


def _check_padding(mask: Tensor | None, key: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise ValueError(f"key_padding_mask is a {type(mask).__name__}; pass a boolean tensor, True = a token.")
    if mask.dtype != torch.bool:
        raise ValueError(f"key_padding_mask has dtype {mask.dtype}; pass a boolean mask, True = a token.")
    check_beside("key_padding_mask", mask, key)
    if mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"key_padding_mask has shape {list(mask.shape)}; it must be [B, Nk] = {[key.shape[0], key.shape[2]]}."
        )
