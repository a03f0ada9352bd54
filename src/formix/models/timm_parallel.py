"""timm's blocks of several branches at once, with any mixer that has keys.

    ParallelScalingBlock   x += ls(A h + F h),  h = norm(x): ViT-22B (arXiv 2302.05442), one projection in
    ParallelThingsBlock    x += sum_i A_i(norm_i x);  x += sum_i F_i(norm_i x): "Three things everyone should know about
                           Vision Transformers" (arXiv 2203.09795)

The weights of the first in formix's own block, and back: `formix.models.parallel_scaling`.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor

from formix.design import LayerDesign, Layout
from formix.layers import Attention
from formix.models.own_blocks import MixerAttention, gated, give_mixer, heads, joined, keep_layout

PARALLEL = Layout(parallel=True, norm="pre")


class _ParallelScaling(MixerAttention):
    """The block is its own attention: it holds `mixer` and the projections."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] -> [B, N, C]"""
        h = self.in_norm(x)
        hidden, q, k, v = self.in_proj(h).split(self.in_split, dim=-1)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        mixed = gated(self, h, self.mix(q, k, v, attn_mask, is_causal))  # [B, N, C]
        hidden = self.mlp_drop(self.mlp_act(hidden))
        if getattr(self, "out_proj", None) is not None:
            y = self.out_proj(torch.cat([mixed, hidden], dim=-1))
        else:
            y = self.attn_out_proj(mixed) + self.mlp_out_proj(hidden)
        return x + self.drop_path(self.ls(y))

    def mix(self: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """The operator on [B, N, C]."""
        q, k, v = (heads(a, self.head_dim) for a in (q, k, v))  # [B, H, N, D]
        q, k = self.q_norm(q), self.k_norm(k)
        return joined(self.attended(q, k, v, attn_mask=attn_mask, is_causal=is_causal))


class MixerParallelBlock(_ParallelScaling, ParallelScalingBlock):
    """timm's `ParallelScalingBlock` with a design's mixer."""


def convert_block(block: Any, layer: LayerDesign, kind: type = MixerParallelBlock) -> None:
    """timm's `ParallelScalingBlock` or `ParallelThingsBlock`."""
    if hasattr(block, "in_proj"):
        keep_layout(block, layer.layout, PARALLEL)
        give_mixer(block, kind, layer.mixer, width=block.in_proj.in_features)
        return
    keep_layout(block, layer.layout)
    for branch in block.attns:
        give_mixer(branch.attn, Attention, layer.mixer)
