"""SimA as a layer."""

from __future__ import annotations

from typing import Any

from formix.design import Sima
from formix.layers.attention import Attention


class SimaAttention(Attention):
    """Q^ (K^^T V) with l1-normalised queries and keys between timm's projections (arXiv 2206.08898).

    `attn_drop` has no effect, as in the official code: in the linear form there are no weights to drop.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, eps: float = 1e-12, **timm: Any) -> None:
        super().__init__(dim, num_heads, mixer=Sima(eps=eps), **timm)
