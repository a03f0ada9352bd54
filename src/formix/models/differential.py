"""timm's differential attention (arXiv 2410.05258) with any mixer that has keys:

    O = (1 - l0) RMSNorm(M(Q1, K1, V) - l M(Q2, K2, V)),   l = exp(lq1 . lk1) - exp(lq2 . lk2) + l0

where M is the design's operator, softmax in the paper, and l0 a constant of the layer. The norm behind takes away the
scale of M, so it does not matter that weights of ReLU attention and SimA do not sum to 1.
"""

from __future__ import annotations

from typing import Any

from timm.layers.diff_attention import DiffAttention
from timm.models.vision_transformer import Block, DiffParallelScalingBlock
from torch import Tensor

from formix.design import LayerDesign, Sima
from formix.models import timm_parallel
from formix.models.own_blocks import LaidOutBlock, MixerAttention, give_mixer, heads, joined, lay_out


class _Difference(MixerAttention):
    def mix(self: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """The difference of both attentions, [B, N, C]."""
        q, k, v = heads(q, self.head_dim), heads(k, self.head_dim), heads(v, 2 * self.head_dim)  # 2 H, 2 H and H heads
        q, k = self.q_norm(q), self.k_norm(k)
        first, second = (
            self.attended(q[:, i::2], k[:, i::2], v, attn_mask=attn_mask, is_causal=is_causal) for i in range(2)
        )
        out = first - self._compute_lambda().type_as(q) * second  # [B, H, N, 2 D]
        return joined(self.sub_norm(out) * (1 - self.lambda_init))

    def mixer_flops(self: Any, x: Tensor) -> int:
        """Operations of both attentions, whose values are twice as wide as their queries and keys."""
        b, n, _ = x.shape
        products = 3 * n  # of a token, head and channel of Q: its weights and their sum of values
        if isinstance(self.mixer, Sima):
            products = min(products, 4 * self.head_dim)  # its parts of K^^T V and of Q^ (K^^T V)
        return 2 * 2 * b * self.num_heads * n * self.head_dim * products


class MixerDiffAttention(_Difference, DiffAttention):
    """timm's `DiffAttention` with a design's mixer."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] -> [B, N, C]"""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.finish(x, self.mix(q, k, v, attn_mask, is_causal))


class MixerDiffParallelBlock(_Difference, timm_parallel._ParallelScaling, DiffParallelScalingBlock):
    """timm's `DiffParallelScalingBlock` with a design's mixer."""


class LaidOutDiffBlock(LaidOutBlock, Block):  # type: ignore[misc]
    """timm's plain `Block` around differential attention in another layout."""


def convert_block(block: Any, layer: LayerDesign) -> None:
    """timm's `Block` with `DiffAttention`, or `DiffParallelScalingBlock`."""
    if isinstance(block, Block):
        give_mixer(block.attn, MixerDiffAttention, layer.mixer)
        lay_out(block, LaidOutDiffBlock, layer)
    else:
        timm_parallel.convert_block(block, layer, MixerDiffParallelBlock)
