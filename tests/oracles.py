"""The operators once more, in float64 and straight from the papers' formulas, independent of the library's code."""

import math

import torch
from torch import Tensor

H = {
    "relu": lambda s: s * (s > 0),
    "relu2": lambda s: s**2 * (s > 0),
    "gelu": lambda s: s * (1 + torch.tanh(math.sqrt(2 / math.pi) * (s + 0.044715 * s**3))) / 2,
    "gelu_erf": lambda s: s * (1 + torch.erf(s / math.sqrt(2))) / 2,
    "softplus": lambda s: torch.logaddexp(s, torch.zeros_like(s)),
    "identity": lambda s: s,
    "relu6": lambda s: torch.minimum(s * (s > 0), torch.full_like(s, 6)),
    "sigmoid": lambda s: (1 + torch.tanh(s / 2)) / 2,
}


def _scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    b, h, n, d = query.shape
    grouped = query.reshape(b, key.shape[1], h // key.shape[1], n, d)  # query head i reads key head i // (H / Hkv)
    scores = torch.einsum("bkgid,bkjd->bkgij", grouped, key).reshape(b, h, n, key.shape[2])
    return scores * (d**-0.5 if scale is None else scale)


def _weighted(weights: Tensor, value: Tensor) -> Tensor:
    b, h, n, m = weights.shape
    grouped = weights.reshape(b, value.shape[1], h // value.shape[1], n, m)
    return torch.einsum("bkgij,bkje->bkgie", grouped, value).reshape(b, h, n, value.shape[3])


def visible(scores: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """[B, H, Nq, Nk], True where query i may see key j."""
    i, j = (torch.arange(n) for n in scores.shape[-2:])
    seen = torch.ones_like(scores, dtype=torch.bool)
    if attn_mask is not None:
        seen = seen & attn_mask
    return seen & (j[None, :] <= i[:, None]) if is_causal else seen


def pointwise(
    query, key, value, *, activation="relu", length_exponent=1.0, length=None, attn_mask=None, is_causal=False,
    scale=None,
):  # fmt: skip
    scores = _scores(query, key, scale)
    seen = visible(scores, attn_mask, is_causal)
    number = (
        seen.sum(-1, keepdim=True).clamp(min=1).double()
        if length is None
        else torch.tensor(float(length), dtype=torch.float64)
    )
    if activation == "sigmoid_bias":
        return _weighted(H["sigmoid"](scores - torch.log(number)) * seen, value)
    return _weighted(H[activation](scores) * seen * number**-length_exponent, value)


def softmax(query, key, value, *, attn_mask=None, is_causal=False, scale=None):
    scores = _scores(query, key, scale)
    seen = visible(scores, attn_mask, is_causal)
    exponentials = torch.exp(scores - scores.amax(-1, keepdim=True)) * seen
    return _weighted(exponentials / exponentials.sum(-1, keepdim=True), value)


def l1(query, key, value, *, key_padding_mask=None, eps=1e-12):
    if key_padding_mask is not None:
        token = key_padding_mask[:, None, :, None].double()
        key, value = key * token, value * token
        query = query * token if query.shape[2] == key.shape[2] else query
    norm_q = torch.maximum(query.abs().sum(2), torch.tensor(eps, dtype=query.dtype))
    norm_k = torch.maximum(key.abs().sum(2), torch.tensor(eps, dtype=query.dtype))
    return torch.einsum("bhid,bhd,bhd,bhjd,bhje->bhie", query, 1 / norm_q, 1 / norm_k, key, value)


ACT = {
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x * (x > 0),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "identity": lambda x: x,
}


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "output", floor: float = 1e-3) -> None:
    """Assert equal shapes and a difference of at most `tolerance` times the largest expected value (or `floor`)."""
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} is not {list(expected.shape)}"
    if not expected.numel():
        return
    bound = tolerance * max(expected.abs().max().item(), floor)
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= bound, f"{what} differs by {error:.3g}, allowed are {bound:.3g}"


def source_of(block, x):
    """Arguments for a block that reads an earlier layer: keys and values, functions of each token of x by itself."""
    if block.layer_design.source is None:
        return {}
    keys = x.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)  # [B, H, N, D]
    return {"source_kv": (keys, keys.flip(-1))}
