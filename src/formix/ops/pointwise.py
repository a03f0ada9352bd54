"""Pointwise attention: a function of each score by itself, divided by a power of the sequence length."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from formix.ops import repeated, triton
from formix.ops.masks import (
    autocast_inputs,
    check_attn_mask,
    check_beside,
    check_number,
    check_qkv,
    check_scores,
    repeat_heads,
    visible_length,
    visible_mask,
    without_autocast,
)
from formix.ops.registry import NO_KERNELS, choose, native_module

# h of the paper's figure 2, and "sigmoid_bias" (see below), which shifts the scores before it
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda s: F.relu(s).square(),
    "gelu": lambda s: F.gelu(s, approximate="tanh"),
    "gelu_erf": F.gelu,
    "softplus": lambda s: F.softplus(s, threshold=40.0),  # torch's own, 20, is 2e-9 off there, which float64 shows
    "identity": lambda s: s,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "sigmoid_bias": torch.sigmoid,
}


def pointwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    activation: str = "relu",
    length_exponent: float = 1.0,
    length: int | None = None,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """O = L^-a h(Q K^T scale) V, with no normalisation over tokens ("Replacing softmax with ReLU in Vision
    Transformers", arXiv 2309.08586, section 3).

    Args:
        query: [B, H, Nq, D]; key: [B, Hkv, Nk, D]; value: [B, Hkv, Nk, Dv]; any strides.
        activation: h, one of relu, relu2 (squared), gelu (tanh form), gelu_erf, softplus, identity, relu6, sigmoid,
            or sigmoid_bias: sigmoid(Q K^T scale - log L) V as in sigmoid attention (arXiv 2409.04431), where the
            length enters as a bias and nothing is divided. Numbers stay those of float32, in which the square of a
            score above 1.8e19 is infinite.
        length_exponent: a >= 0.
        length: L. None: the number of keys that the row may see (all, the unmasked ones, i + 1 if causal);
            an integer fixes it.
        attn_mask: boolean, broadcastable to [B, H, Nq, Nk], True = attend. Masked weights are 0 after h, and a row
            that sees no key gives 0.
        attn_bias: floating point, added to the scores before h, broadcastable to [B, H, Nq, Nk]: relative
            positions. The kernels have none.
        is_causal: query i sees keys 0 to i, within attn_mask if that is given too.
        scale: factor of the scores; None: D^-1/2.
        enable_gqa: H may be a multiple of Hkv.
        dropout_p: probability of dropping a weight (the others are scaled up), always applied when above 0.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        [B, H, Nq, Dv] in query's dtype (autocast's, where it is on); products and sums are accumulated in float32
        for 16-bit inputs.

    Raises:
        ValueError: shapes, dtypes, a float mask, an unknown name, or an `impl` that cannot run this call.
    """
    given = (
        activation, length_exponent, length, is_causal, scale, enable_gqa, dropout_p, impl,
        length_exponent.__class__, length.__class__, scale.__class__, dropout_p.__class__,  # 1, 1.0 and True are equal
    )  # fmt: skip
    signature = None
    if attn_bias is None:  # which the kernels do not know
        signature = repeated.signature("pointwise_attention", query, key, value, attn_mask, given)
    if signature is not None and (out := repeated.run(signature, query, key, value, attn_mask)) is not None:
        return out
    query, key, value = autocast_inputs(query, key, value)
    check_qkv(query, key, value, enable_gqa=enable_gqa)
    check_attn_mask(attn_mask, query, key)
    if attn_bias is not None:
        _check_bias(attn_bias, query, key)
    check_scores(is_causal, scale)
    _check_options(activation, length_exponent, length, dropout_p)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if activation == "sigmoid_bias":
        length_exponent = 0.0
    options = {
        "activation": activation,
        "length_exponent": float(length_exponent),
        "length": length,
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "scale": float(scale),
    }

    def refusal(impl: str) -> str | None:
        kernels = triton if impl == "triton" else native_module()
        if kernels is None:
            return NO_KERNELS
        if dropout_p > 0 or attn_bias is not None:
            return f"the kernels have no {'dropout of weights' if dropout_p > 0 else 'bias of the scores'}"
        return kernels.cannot_run(query, key, value)

    chosen = choose("pointwise_attention", impl, query.device, refusal)
    if chosen == "native":
        return native_module().pointwise_attention(  # type: ignore[union-attr]
            query, key, value, enable_gqa=enable_gqa, signature=signature, **options
        )
    if chosen == "triton":
        return triton.pointwise_attention(query, key, value, **options)  # type: ignore[arg-type]
    with without_autocast(query):
        return _reference(query, key, value, attn_bias=attn_bias, dropout_p=dropout_p, **options)  # type: ignore[arg-type]


def _reference(
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
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    dtype = query.dtype
    compute = torch.promote_types(dtype, torch.float32)
    q, k, v = query.to(compute), key.to(compute), value.to(compute)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])  # [B, H, Nk, D]
    mask = visible_mask(attn_mask, is_causal, q, k)
    number = visible_length(mask, k) if length is None else length

    scores = (q * scale) @ k.transpose(-2, -1)  # [B, H, Nq, Nk]
    if attn_bias is not None:
        scores = scores + attn_bias.to(compute)
    if activation == "sigmoid_bias":
        scores = scores - torch.as_tensor(number, dtype=compute, device=q.device).log()
    weights = ACTIVATIONS[activation](scores)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    out = weights @ v  # [B, H, Nq, Dv]
    if length_exponent:
        out = out * torch.as_tensor(number, dtype=compute, device=q.device) ** -length_exponent
    return out.to(dtype)


def _check_bias(bias: Tensor, query: Tensor, key: Tensor) -> None:
    target = [*query.shape[:3], key.shape[2]]
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        given = f"has dtype {bias.dtype}" if isinstance(bias, Tensor) else f"is a {type(bias).__name__}"
        raise ValueError(f"attn_bias {given}; pass a floating-point tensor that broadcasts to {target}.")
    check_beside("attn_bias", bias, query)
    if bias.dim() > 4 or any(n not in (1, t) for n, t in zip(bias.shape[::-1], target[::-1], strict=False)):
        raise ValueError(f"attn_bias has shape {list(bias.shape)}; it must broadcast to {target}.")


def _check_options(activation: str, length_exponent: float, length: int | None, dropout_p: float) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(map(repr, ACTIVATIONS))}.")
    check_number("length_exponent", length_exponent, low=0)
    if activation == "sigmoid_bias" and length_exponent not in (0, 1):
        raise ValueError(
            f"length_exponent is {length_exponent}, but in 'sigmoid_bias' the length enters as the bias -log L "
            "instead; leave length_exponent at 1 or use activation='sigmoid'."
        )
    if length is not None and (isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)) or length < 1):
        raise ValueError(f"length is {length!r}; it must be None or a positive whole number of keys.")
    check_number("dropout_p", dropout_p, low=0, below=1)
