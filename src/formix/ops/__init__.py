"""The mathematics: pure functions on [B, H, N, D] with the argument names and mask rules of PyTorch's own
`scaled_dot_product_attention`. The plain-torch reference of each is the oracle of its faster implementations."""

from formix.ops.gated import gated_unit
from formix.ops.l1 import l1_attention
from formix.ops.pointwise import pointwise_attention
from formix.ops.registry import Implementation, implementations
from formix.ops.skip_layer import select_heads, skip_layer_attention

__all__ = [
    "Implementation",
    "gated_unit",
    "implementations",
    "l1_attention",
    "pointwise_attention",
    "select_heads",
    "skip_layer_attention",
]
