"""Pointwise (ReLU) attention as a layer."""

from __future__ import annotations

from typing import Any, Literal

from formix.design import Activation, Gate, Pointwise
from formix.layers.attention import Attention


class PointwiseAttention(Attention):
    """L^-a h(Q K^T / sqrt(d)) V between timm's projections (arXiv 2309.08586); options as `formix.design.Pointwise`.

    `qk_norm=True` is the trunk's norm (timm's word); `scale_only_qk_norm=True` the paper's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        activation: Activation = "relu",
        length_exponent: float = 1.0,
        length: int | Literal["visible", "keys"] = "visible",
        gate: Gate | None = None,
        scale_only_qk_norm: bool = False,
        **timm: Any,
    ) -> None:
        mixer = Pointwise(
            activation=activation,
            length_exponent=length_exponent,
            length=length,
            gate=gate,
            qk_norm=scale_only_qk_norm,
        )
        super().__init__(dim, num_heads, mixer=mixer, **timm)
