"""nn.Modules on [B, N, C] in timm's vocabulary: the mixers, and the block that composes mixer, layout and wiring."""

from formix.layers.attend import attend
from formix.layers.attention import Attention
from formix.layers.block import Block, BlockStack
from formix.layers.gated_unit import GatedUnit
from formix.layers.layout import compose
from formix.layers.pointwise import PointwiseAttention
from formix.layers.sima import SimaAttention
from formix.layers.softmax import SoftmaxAttention

__all__ = [
    "Attention",
    "Block",
    "BlockStack",
    "GatedUnit",
    "PointwiseAttention",
    "SimaAttention",
    "SoftmaxAttention",
    "attend",
    "compose",
]
