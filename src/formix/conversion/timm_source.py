"""Sources of timm: Vision Transformers with one attention per block, and XCiT."""

from __future__ import annotations

import dataclasses
from typing import Any

import timm
from timm.layers import GluMlp, LayerScale
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.xcit import Xcit
from torch import nn

from formix.conversion.source import Source, unknown_family
from formix.conversion.weight_map import ROWS, Rule, resolve
from formix.design import Design
from formix.models.parts import find_layers
from formix.models.vit import without_weights

SAME_NAMES = Rule(sources=(r"(?P<n>.*)",), target="{n}")
XCIT = (
    Rule(sources=(r"pos_embed\.(?P<n>.*)",), target="pos_embeder.{n}"),
    Rule(
        sources=tuple(rf"cls_attn_blocks\.(?P<i>\d+)\.attn\.{part}\.(?P<w>weight|bias)" for part in "qkv"),
        target="cls_attn_blocks.{i}.attn.qkv.{w}",
        operation=ROWS,
    ),
    # all others but the temperatures of cross-covariance attention, which no design has
    Rule(
        sources=(r"(?P<n>(?!pos_embed\.|cls_attn_blocks\.\d+\.attn\.[qkv]\.|blocks\.\d+\.attn\.temperature).*)",),
        target="{n}",
    ),
)


def open_timm(model: Any) -> Source:
    """The source for a model of timm's.

    Raises:
        ValueError: another architecture, blocks of several branches, or arguments that its name does not give back.
    """
    from formix.models import own_blocks
    from formix.models.vit import create_vit

    if type(model) is Xcit:
        return _xcit(model)
    own_kind = own_blocks.kind_of(model)
    if own_kind is None and type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise unknown_family(model)
    block = model.blocks[0]
    if (own_kind is None and (type(block) is not Block or type(block.attn) is not Attention)) or not find_layers(model):
        kind = type(block).__name__ if type(block) is not Block else type(block.attn).__name__
        raise ValueError(
            f"This {type(model).__name__} has blocks of its own ({kind}); formix converts timm's blocks of one "
            "attention and one FFN: plain, with rotary (Eva) or relative positions, or norms behind the branches."
        )
    name, arguments = _asked_for(model, _ARGUMENTS[type(model)])
    moves, unplaced = resolve([SAME_NAMES], model.state_dict())

    def build(design: Design) -> Any:
        distilled = isinstance(model, VisionTransformerDistilled)
        return create_vit(name, design, **(arguments if distilled else pooled(arguments, design, len(model.blocks))))

    return _source("vit", name, arguments, model, build, moves, unplaced)


def _xcit(model: Xcit) -> Source:
    from formix.models.xcit import create_xcit

    name, arguments = _asked_for(model, _xcit_arguments)
    moves, unplaced = resolve(XCIT, model.state_dict())

    def build(design: Design) -> Any:
        # timm's class attention is the official code's: patch tokens go through its norms and layer scale as well
        return create_xcit(name, dataclasses.replace(design, official=True), **arguments)

    return _source("xcit", name, arguments, model, build, moves, unplaced)


def _source(family: str, name: str, arguments: dict, model: Any, build: Any, moves: list, unplaced: list) -> Source:
    description = {"library": "timm", "class": type(model).__name__, "name": name, "arguments": arguments}
    return Source(
        family=family,
        depth=len(model.blocks),
        causal=False,
        design=None if family == "xcit" else Design(),  # cross-covariance attention is no mixer of formix's
        build=build,
        rebuild=lambda: rebuild(description),
        description=description,
        moves=moves,
        unplaced=unplaced,
    )


def pooled(arguments: dict[str, Any], design: Design, depth: int) -> dict[str, Any]:
    """The arguments, with the tokens' mean in place of a class token that a design without mixing leaves blind."""
    blind = not design.mixes_tokens(depth) and arguments.get("global_pool", "token") == "token"
    return arguments | {"global_pool": "avg", "fc_norm": False} if blind else arguments


def rebuild(description: dict[str, Any]) -> Any:
    """timm's own class again."""
    return timm.create_model(description["name"], **description["arguments"])


def _asked_for(model: Any, read: Any) -> tuple[str, dict[str, Any]]:
    """The registered name and the arguments that build this model."""
    name = str(dict(model.pretrained_cfg).get("architecture") or "") if hasattr(model, "pretrained_cfg") else ""
    if not name or not timm.is_model(name):
        raise ValueError("This timm model does not say its name (pretrained_cfg); make it with timm.create_model.")
    wanted = read(model)
    always = {k: wanted[k] for k in ("num_classes", "img_size", "in_chans", "global_pool")}
    probe = without_weights(name, **always)
    arguments = always | {k: v for k, v in wanted.items() if read(probe)[k] != v}
    return name, arguments


def _common_arguments(model: Any) -> dict[str, Any]:
    block, width = model.blocks[0], model.embed_dim
    hidden = block.mlp.fc2.in_features if hasattr(block.mlp, "fc2") else 0
    return {
        "num_classes": model.num_classes,
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.in_chans,
        "global_pool": model.global_pool,
        "embed_dim": width,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": (hidden + 0.5) / width,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
    }


def _vit_arguments(model: Any) -> dict[str, Any]:
    block = model.blocks[0]
    fc_norm = not isinstance(model.fc_norm, nn.Identity)
    common = _common_arguments(model)
    if isinstance(block.mlp, GluMlp):  # here the ratio is of its gate and value together
        both: Any = block.mlp.fc1
        common["mlp_ratio"] = (both.out_features + 0.5) / model.embed_dim
    return common | {
        "pool_include_prefix": model.pool_include_prefix,
        "qkv_bias": block.attn.qkv.bias is not None,
        "proj_bias": block.attn.proj.bias is not None,
        "scale_attn_norm": not isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity),
        "scale_mlp_norm": not isinstance(getattr(block.mlp, "norm", nn.Identity()), nn.Identity),
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "init_values": 1.0 if isinstance(getattr(block, "ls1", None), LayerScale) else None,
        "class_token": model.has_class_token,
        "reg_tokens": model.num_reg_tokens,
        "no_embed_class": model.no_embed_class,
        "pos_embed": "learn" if model.pos_embed is not None else "none",
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
        "final_norm": fc_norm or not isinstance(model.norm, nn.Identity),
        "fc_norm": fc_norm,
    }


def _eva_arguments(model: Any) -> dict[str, Any]:
    block = model.blocks[0]
    return _common_arguments(model) | {
        "init_values": None if block.gamma_1 is None else 1.0,
        "class_token": model.cls_token is not None,
        "num_reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "no_embed_class": model.no_embed_class,
        "use_abs_pos_emb": model.pos_embed is not None,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
        "use_post_transformer_norm": not isinstance(model.norm, nn.Identity),
        "use_fc_norm": not isinstance(model.fc_norm, nn.Identity),
    }


def _relpos_arguments(model: Any) -> dict[str, Any]:
    return _common_arguments(model) | {
        "qkv_bias": model.blocks[0].attn.qkv.bias is not None,
        "init_values": 1.0 if isinstance(getattr(model.blocks[0], "ls1", None), LayerScale) else None,
        "class_token": model.cls_token is not None,
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
    }


_ARGUMENTS = {
    VisionTransformer: _vit_arguments,
    VisionTransformerDistilled: _vit_arguments,
    Eva: _eva_arguments,
    VisionTransformerRelPos: _relpos_arguments,
}


def _xcit_arguments(model: Any) -> dict[str, Any]:
    block = model.blocks[0]
    return {
        "num_classes": model.num_classes,
        "img_size": list(model.patch_embed.img_size),
        "in_chans": model.in_chans,
        "global_pool": model.global_pool,
        "patch_size": model.patch_embed.patch_size if isinstance(model.patch_embed.patch_size, int) else 16,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "qkv_bias": block.attn.qkv.bias is not None,
        "cls_attn_layers": len(model.cls_attn_blocks),
        "tokens_norm": model.cls_attn_blocks[0].tokens_norm,
        "use_pos_embed": model.pos_embed is not None,
    }
