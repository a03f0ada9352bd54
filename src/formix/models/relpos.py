"""timm's Vision Transformers with relative position biases (`vit_relpos_*`, `vit_srelpos_*`), with any mixer that has
keys.

The bias B [H, N, N] is computed from the patches' relative positions, per layer or once for all; where it enters each
mixer is in `formix.layers.attend`.
"""

from __future__ import annotations

from typing import Any

from timm.models import vision_transformer_relpos as relpos
from torch import Tensor

from formix.design import LayerDesign, Sima
from formix.models.own_blocks import (
    LaidOutBlock,
    MixerAttention,
    OwnBlocks,
    give_mixer,
    heads,
    joined,
    keep_layout,
    lay_out,
)


class MixerRelPosAttention(MixerAttention, relpos.RelPosAttention):
    """timm's `RelPosAttention` with a design's mixer."""

    def forward(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C]; `shared_rel_pos` [1, H, N, N] is the bias of all layers, if they have none each."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (heads(part, self.head_dim) for part in (q, k, v))  # [B, H, N, D]
        q, k = self.q_norm(q), self.k_norm(k)
        bias = self.rel_pos.get_bias() if self.rel_pos is not None else shared_rel_pos
        return self.finish(x, joined(self.attended(q, k, v, attn_bias=bias)))

    def mixer_flops(self: Any, x: Tensor) -> int:
        """Operations of the mixer and, where it cannot take the bias into its weights, of the bias' product."""
        b, n, _ = x.shape
        per_product = 2 * b * self.num_heads * n**2 * self.head_dim
        if isinstance(self.mixer, Sima):
            return min(2 * per_product, 4 * b * self.num_heads * n * self.head_dim**2) + per_product
        return 2 * per_product


class LaidOutRelPosBlock(LaidOutBlock, relpos.RelPosBlock):  # type: ignore[misc]
    """timm's `RelPosBlock` in another layout."""


class FormixVisionTransformerRelPos(OwnBlocks, relpos.VisionTransformerRelPos):
    """timm's `VisionTransformerRelPos` in a design."""

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return relpos.checkpoint_filter_fn(state, self)


TRUNK = FormixVisionTransformerRelPos


def convert_block(block: Any, layer: LayerDesign) -> None:
    """timm's `RelPosBlock` or its form with norms behind the branches."""
    give_mixer(block.attn, MixerRelPosAttention, layer.mixer)
    if isinstance(block, relpos.RelPosBlock):
        lay_out(block, LaidOutRelPosBlock, layer)
    else:
        keep_layout(block, layer.layout)
