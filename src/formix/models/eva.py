"""timm's Eva, the Vision Transformer with rotary positions (RoPE-ViT, DINOv3, Perception Encoder, EVA-02, Sapiens2),
with any mixer that has keys.

    q_i <- R_i q_i,   k_j <- R_j k_j      for patches i and j; class and register tokens are not rotated
    O = mixer(Q, K, V)

Softmax and pointwise attention see q_i R_i^T R_j k_j, the relative position alone. SimA divides every channel of the
rotated queries and keys by its l1 norm over all tokens: the two channels that a rotation mixes have norms of their own,
so its weights depend on relative positions up to the ratio of these norms, which is near 1 where a channel's absolute
value is spread evenly over the image.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models import eva
from torch import Tensor

from formix.design import LayerDesign
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


class _Rotary(MixerAttention):
    """Attention with rotated queries and keys; grouped-query heads where timm's has them."""

    def forward(
        self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, C] -> [B, N, C]; `rope` is timm's [.., N, 2 D], sine and cosine of every patch."""
        q, k, v = self.projected(x)
        q, k, v = (heads(part, self.head_dim) for part in (q, k, v))  # [B, H, N, D], [B, Hkv, N, D] twice
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self.rotated(a, rope).type_as(v) for a in (q, k))
        out = self.attended(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        return self.finish(x, joined(out))

    def projected(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, [B, N, H D] each."""
        if self.qkv is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.qkv(x).chunk(3, dim=-1)

    def rotated(self: Any, a: Tensor, rope: Tensor) -> Tensor:
        prefix, patches = a.split([self.num_prefix_tokens, a.shape[2] - self.num_prefix_tokens], dim=2)
        half: bool = getattr(self, "rotate_half", False)
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=half)], dim=2)


class RotaryAttention(_Rotary, AttentionRope):
    """timm's `AttentionRope` with a design's mixer."""


class RotaryEvaAttention(_Rotary, eva.EvaAttention):
    """timm's `EvaAttention`, whose keys have no bias, with a design's mixer."""

    def projected(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        if self.qkv is None or self.q_bias is None:
            return super().projected(x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        return (self.qkv(x) + bias).chunk(3, dim=-1)  # added here, so that an adapter on qkv is not bypassed


class LaidOutEvaBlock(LaidOutBlock, eva.EvaBlock):  # type: ignore[misc]
    """timm's `EvaBlock` in another layout."""

    def scaled(self: Any, branch: int, y: Tensor) -> Tensor:
        gamma = getattr(self, f"gamma_{branch}")
        return y if gamma is None else gamma * y


class FormixEva(OwnBlocks, eva.Eva):
    """timm's `Eva` in a design."""

    fc_norm_argument = "use_fc_norm"

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return eva.checkpoint_filter_fn(state, self)


TRUNK = FormixEva
_ATTENTIONS: dict[type, type] = {AttentionRope: RotaryAttention, eva.EvaAttention: RotaryEvaAttention}


def convert_block(block: Any, layer: LayerDesign) -> None:
    """timm's `EvaBlock` or its form with norms behind the branches."""
    give_mixer(block.attn, _ATTENTIONS[type(block.attn)], layer.mixer)
    if isinstance(block, eva.EvaBlock):
        lay_out(block, LaidOutEvaBlock, layer)
    else:
        keep_layout(block, layer.layout)
