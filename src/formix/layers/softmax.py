"""Softmax attention as a layer."""

from __future__ import annotations

from typing import Any

from formix.design import Gate, Softmax
from formix.layers.attention import Attention


class SoftmaxAttention(Attention):
    """softmax(Q K^T / sqrt(d)) V between timm's projections; with `gate`, gated attention (arXiv 2505.06708)."""

    def __init__(self, dim: int, num_heads: int = 8, *, gate: Gate | None = None, **timm: Any) -> None:
        super().__init__(dim, num_heads, mixer=Softmax(gate=gate), **timm)
