"""What `torch.jit.script` compiles in place of formix's image models: timm's trunks on scriptable blocks.

The stand-ins share the models' parameters; the models themselves are left as they are.
"""

from __future__ import annotations

import copy
from typing import Any, Optional

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from torch import Tensor, nn

from formix.layers.script import ScriptableAttention, ScriptableMixer, ScriptableStack, wide


class _Trunk:
    """timm's trunk with masks for the blocks."""

    def forward_features(self: Any, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        return self.norm(self.blocks(x, attn_mask, is_causal))


class ScriptableViT(_Trunk, VisionTransformer):
    """A ViT of any design."""


class ScriptableDistilledViT(_Trunk, VisionTransformerDistilled):
    """A distilled DeiT of any design."""


class ScriptableReluViT(_Trunk, VisionTransformer):
    """big_vision's ViT, with its layer before the classifier."""

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.fc_norm(self.pool(x))
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


class ScriptableClassAttention(ScriptableAttention):
    """XCiT's class attention: [B, N + 1, C] -> [B, 1, C]."""

    def __init__(self, attn: Any) -> None:
        super().__init__(attn)
        self.eps = attn.eps

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.kind == "sima":
            dtype = v.dtype
            q, k, v = wide(q), wide(k), wide(v)
            norms = q.abs().sum(-2, keepdim=True).clamp(min=self.eps)
            row = q[:, :, :1] / norms / k.abs().sum(-2, keepdim=True).clamp(min=self.eps)
            weights = nn.functional.dropout(row @ k.transpose(-2, -1), self.dropout, self.training)
            out = (weights @ v).to(dtype)
        else:
            out = self.mix(q[:, :, :1], k, v, None, False)
        return self.proj_drop(self.proj(self.gated(x[:, :1], out)))


class ScriptableActivator(nn.Module):
    """Activator's classifier and its family."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.patcher, self.model, self.classifier = model.patcher, model.model, model.classifier
        self.head_drop, self.mean = model.head_drop, model.global_pool == "avg"
        size: tuple[int, int] = model.size if model.kind == "ninformer" else (0, 0)
        self.height, self.width = size

    def forward(self, x: Tensor) -> Tensor:
        if self.height > 0 and (x.shape[2] != self.height or x.shape[3] != self.width):
            raise ValueError("NiNformer's token mixing is built for one image size: resize the image.")
        x = self.model(self.patcher(x).flatten(2).transpose(1, 2))  # [B, N, C]
        return self.classifier(self.head_drop(x.mean(dim=1) if self.mean else x))


def scriptable_vit(model: Any, trunk: type) -> nn.Module:
    """A ViT's stand-in of class `trunk`."""
    twin = _twin(model, trunk)
    twin.blocks = ScriptableStack(model.blocks)
    return twin


def scriptable_xcit(model: Any) -> nn.Module:
    """An XCiT's stand-in: timm's own with its attentions replaced, and timm's name for the position encoding."""
    twin = _twin(model, Xcit)
    twin.pos_embed = model.pos_embed
    twin.__dict__["_modules"].pop("pos_embeder", None)

    def with_attention(block: Any, attention: Any) -> nn.Module:
        new = _twin(block, type(block))
        new.attn = attention(block.attn)
        return new

    twin.blocks = nn.ModuleList(with_attention(b, ScriptableMixer) for b in model.blocks)
    if model.cls_attn_blocks is not None:
        twin.cls_attn_blocks = nn.ModuleList(with_attention(b, ScriptableClassAttention) for b in model.cls_attn_blocks)
    return twin


def _twin(module: Any, kind: type) -> Any:
    """A module of class `kind` with the same parts: replacing one leaves the original's in place."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    for name in ("design", "base", "arguments", "architecture"):  # TorchScript has no types for these
        twin.__dict__.pop(name, None)
    twin.__class__ = kind
    return twin
