"""timm's Vision Transformers whose blocks are of their own kind: the trunk, its blocks and their parameters stay
timm's, and a design's mixer takes the place of the softmax in every attention.

    rotary positions            Eva: `vit_*_rope_*`, `vit_*_dinov3`, `vit_pe_*`, ...     `formix.models.eva`
    relative position biases    `vit_relpos_*`, `vit_srelpos_*`                          `formix.models.relpos`
    several branches at once    `vit_*_18x2_*`, `vit_*_xp_*`, `vit_pwee_*`               `formix.models.timm_parallel`
    norms behind the branches   `vit_*_rpn_*`                                            here
    differential attention      `vit_dwee_*`, `vit_dlittle_*`, `vit_dpwee_*`             `formix.models.differential`

Names of parameters are timm's, so its weights load. A block that has one attention and one FFN behind a norm each can
also have another layout, such as PAF's; all others keep the order of their parts, which is what defines them.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch.fx
from timm.layers import register_notrace_module, trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from formix.design import Design, GatedUnit, LayerDesign, Layout, Mixer, Sima
from formix.layers import Attention, attend, compose
from formix.layers.attention import GATES
from formix.layers.layout import norm_position, norms_used
from formix.models.designed import Designed

# timm's class of a block -> the module with `convert_block(block, layer)`, which changes a block in place, and `TRUNK`
_KINDS = {
    "EvaBlock": "formix.models.eva",
    "EvaBlockPostNorm": "formix.models.eva",
    "RelPosBlock": "formix.models.relpos",
    "ResPostRelPosBlock": "formix.models.relpos",
    "ParallelThingsBlock": "formix.models.timm_parallel",
    "ParallelScalingBlock": "formix.models.timm_parallel",
    "DiffParallelScalingBlock": "formix.models.differential",
    "DiffAttention": "formix.models.differential",  # in timm's plain Block
    "ResPostBlock": __name__,
}


class OwnBlocks(Designed):
    """A trunk of timm's with timm's blocks and the design's mixers."""

    def __prepare_scriptable__(self) -> nn.Module:
        raise ValueError(
            "TorchScript knows formix's models with timm's plain block alone; export this one with torch.export."
        )


class OwnBlocksVisionTransformer(OwnBlocks, VisionTransformer):
    """timm's `VisionTransformer` with another block than its plain one, in a design."""


def kind_of(model: Any) -> str | None:
    """The key of `_KINDS` for a trunk of timm's; None if its blocks, or the trunk around them, are not known here."""
    blocks = getattr(model, "blocks", None)
    first = blocks[0] if isinstance(blocks, nn.Sequential | nn.ModuleList) else None
    names = (type(first).__name__, type(getattr(first, "attn", None)).__name__)
    kind = next((name for name in names if name in _KINDS), None)
    return kind if kind is not None and type(model) in _trunk(kind).__mro__ else None


def convert(model: Any, kind: str, design: Design) -> None:
    """Put the design's mixers and layouts into timm's `model`, in place; its weights stay.

    Raises:
        ValueError: a mixer, layout or wiring that blocks of this kind cannot have.
    """
    family, depth = importlib.import_module(_KINDS[kind]), len(model.blocks)
    if design.wiring is not None:
        raise ValueError(f"Skip wiring needs blocks that hand on keys and values; timm's {kind} does not.")
    for i, block in enumerate(model.blocks):
        block.layer_design = design.layer(i, depth)
        family.convert_block(block, block.layer_design)
    model.__class__ = _trunk(kind)  # timm's own in all but its description


def _trunk(kind: str) -> type:
    """What the model becomes: a class that extends timm's."""
    return getattr(importlib.import_module(_KINDS[kind]), "TRUNK", OwnBlocksVisionTransformer)


def convert_block(block: Any, layer: LayerDesign) -> None:
    """timm's `ResPostBlock`: x += norm1(A x); x += norm2(F x)."""
    give_mixer(block.attn, Attention, layer.mixer)
    keep_layout(block, layer.layout)


torch.fx.wrap("attend")  # a node of FX graphs: what it does depends on the inputs


@register_notrace_module  # type: ignore[arg-type]  # a leaf of timm's extractor, as formix.layers.Attention
class MixerAttention:
    """What timm's attentions of any kind become: everything around the operator stays, for [B, N, C] inputs."""

    mixer: Mixer

    def finish(self: Any, x: Tensor, out: Tensor) -> Tensor:
        """From the operator's output [B, N, H D] of the input `x` to the attention's: norm, gate, projection."""
        out = self.norm(out) if hasattr(self, "norm") else out
        return self.proj_drop(self.proj(gated(self, x, out)))

    def attended(self: Any, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        """The operator's output [B, H, N, D], weights dropped in training; `given` goes to `attend`."""
        return attend(self.mixer, q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0, **given)


def gated(attn: Any, x: Tensor, out: Tensor) -> Tensor:
    """`out` times the mixer's gate of `x`, if it has one."""
    return out if attn.gate is None else out * GATES[attn.mixer.gate](attn.gate(x))


def give_mixer(attn: Any, kind: type, mixer: Mixer, *, width: int | None = None) -> None:
    """Make timm's attention `attn` one of class `kind` with `mixer`, in place, and add the mixer's own parameters.

    Args:
        width: C, of the input and of all heads together; None: as `attn.proj` has them.

    Raises:
        ValueError: a gated unit, which is no attention, or a mixer with another number of heads than the model.
    """
    if isinstance(mixer, GatedUnit):
        raise ValueError(
            "A gated unit mixes no tokens, and this model is one for its kind of attention: choose a design with keys."
        )
    if isinstance(mixer, Sima) and mixer.num_heads not in (None, attn.num_heads):
        raise ValueError(
            f"The design's num_heads is {mixer.num_heads}, but timm's attention in this model has {attn.num_heads} "
            "heads; pass num_heads to the model instead."
        )
    assert getattr(attn, "gate", None) is None, "none of timm's names has a gate"
    weight = next(attn.parameters())
    like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    attn.__class__ = kind
    attn.mixer, attn.gate, attn.skip_heads = mixer, None, ()
    if getattr(mixer, "qk_norm", False):
        attn.q_norm, attn.k_norm = (nn.LayerNorm(attn.head_dim, eps=1e-6, bias=False, **like) for _ in "qk")
    if getattr(mixer, "gate", None):
        inner, outer = (width, width) if width is not None else (attn.proj.in_features, attn.proj.out_features)
        attn.gate = nn.Linear(outer, inner, **like)
        trunc_normal_(attn.gate.weight, std=0.02)
        nn.init.zeros_(attn.gate.bias)


class LaidOutBlock:
    """One of timm's blocks with `norm1`, `attn`, `norm2` and `mlp` in another order: `formix.layers.compose`."""

    layout: Layout
    norm_position: Any

    def forward(self: Any, x: Tensor, **given: Any) -> Tensor:
        """[B, N, C] -> [B, N, C]; `given` goes to the attention."""

        def mix(h: Tensor) -> Tensor:
            return self.drop_path1(self.scaled(1, self.attn(h, **given)))

        def feed(h: Tensor) -> Tensor:
            return self.drop_path2(self.scaled(2, self.mlp(h)))

        return compose(x, mix, feed, self.norm1, self.norm2, layout=self.layout, norm=self.norm_position)

    def scaled(self: Any, branch: int, y: Tensor) -> Tensor:
        """A branch's output by its layer scale."""
        return getattr(self, f"ls{branch}")(y)


def lay_out(block: Any, kind: type, layer: LayerDesign) -> None:
    """Give timm's pre-norm block the layer's layout, in place; `kind` is its class with `LaidOutBlock`.

    Raises:
        ValueError: a layout without the FFN.
    """
    layout = layer.layout
    if not layout.ffn:
        raise ValueError("These blocks always have their FFN; a layout without it is for timm's plain ViT names.")
    if layout in (Layout(), Layout(norm="pre")):
        return
    block.__class__ = kind
    block.layout, block.norm_position = layout, norm_position(layout, "pre")
    for used, name in zip(norms_used(layout, "pre"), ("norm1", "norm2"), strict=True):
        if not used and not layer.official:
            setattr(block, name, nn.Identity())


def keep_layout(block: nn.Module, layout: Layout, *own: Layout) -> None:
    """Raise `ValueError` unless the layout is the default or among the block's own."""
    if layout not in (Layout(), *own):
        raise ValueError(
            f"timm's {type(block).__name__} is defined by the order of its parts, and this design has another layout: "
            "leave the layout out, or take a name with timm's plain block."
        )


def heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, N, H D] -> [B, H, N, D]"""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def joined(out: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H D]"""
    return out.transpose(1, 2).flatten(2)
