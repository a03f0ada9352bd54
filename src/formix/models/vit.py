"""Vision Transformers: timm's trunk with formix's blocks."""

from __future__ import annotations

import functools
import logging
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, load_checkpoint
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from formix.design import Design, LayerDesign
from formix.design import design as find_design
from formix.layers import Block as FormixBlock
from formix.layers import BlockStack
from formix.models.designed import Designed
from formix.models.image import RUNTIME_ARGUMENTS, check_sizes
from formix.models.recorded import remember_record

_log = logging.getLogger("formix")


class _DesignedTrunk(Designed):
    """What a timm trunk needs to run a `BlockStack`: all other methods stay timm's."""

    def forward_features(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, C, H, W] -> normalised tokens [B, N, C]."""
        return self.norm(self.blocks(self._tokens(x), attn_mask, is_causal))

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As timm's `VisionTransformer.forward_intermediates`."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NLC'.")
        take, last = feature_take_indices(len(self.blocks), indices)
        taken: dict[int, Tensor] = dict.fromkeys(take, x)
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        final = self.blocks(self._tokens(x), attn_mask, is_causal, taken, last if stop_early else None)
        outputs = [self.norm(taken[i]) if norm else taken[i] for i in sorted(set(take))]  # [B, prefix + N, C]

        prefix = [y[:, : self.num_prefix_tokens] for y in outputs] if self.num_prefix_tokens else None
        outputs = [y[:, self.num_prefix_tokens :] for y in outputs]
        if output_fmt == "NCHW":
            outputs = [y.transpose(1, 2).unflatten(2, tuple(grid)).contiguous() for y in outputs]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": outputs}
            if prefix is not None and return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            return result if intermediates_only else result | {"image_features": self.norm(final)}
        if prefix is not None and return_prefix_tokens:
            outputs = list(zip(outputs, prefix, strict=True))
        return outputs if intermediates_only else (self.norm(final), outputs)

    def set_grad_checkpointing(self: Any, enable: bool = True) -> None:
        """Recompute activations block by block in the backward pass."""
        self.blocks.grad_checkpointing = enable
        if hasattr(self.patch_embed, "set_grad_checkpointing"):
            self.patch_embed.set_grad_checkpointing(enable)

    def prune_intermediate_layers(
        self: Any, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's: drop the blocks above the last index, and the norm or the head if asked."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]  # a slice of a BlockStack is a BlockStack
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def load_pretrained(self: Any, checkpoint_path: str, prefix: str = "") -> None:
        """big_vision's npz weights (timm's ``checkpoint_path="weights.npz"``), every one in its place.

        Raises:
            ValueError: weights without a place, places without weights, or another image size.
        """
        from formix.models import big_vision

        tree = big_vision.read_npz(checkpoint_path)
        big_vision.load_npz(self, {k.removeprefix(prefix): v for k, v in tree.items() if k.startswith(prefix)})

    def fix_init_weight(self: Any) -> None:
        """timm's scaling of the last weights of both branches by 1 / sqrt(2 layer), where a block has them."""
        with torch.no_grad():
            for i, block in enumerate(self.blocks):
                last = block.attn.proj if hasattr(block.attn, "proj") else block.attn.fc3
                last.weight.div_((2.0 * (i + 1)) ** 0.5)
                if block.mlp is not None:
                    block.mlp.fc2.weight.div_((2.0 * (i + 1)) ** 0.5)

    def _tokens(self: Any, x: Tensor) -> Tensor:
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))  # [B, N, C]


class FormixVisionTransformer(_DesignedTrunk, VisionTransformer):  # type: ignore[misc]
    """timm's `VisionTransformer` with blocks of a `Design`; the same parameter names, methods and heads."""

    pos_antialias = True  # of position embeddings that are resampled for another image size

    def _pos_embed(self: Any, x: Tensor) -> Tensor:
        """As timm's; without antialiasing for a class token and patches whose grid [B, H, W, C] decides the size."""
        if self.pos_antialias:
            return VisionTransformer._pos_embed(self, x)
        positions = resample_abs_pos_embed(
            self.pos_embed, list(x.shape[1:3]), list(self.patch_embed.grid_size), num_prefix_tokens=1, antialias=False
        )
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)  # [B, 1 + N, C]
        return self.pos_drop(tokens + positions)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, as timm's; refused where no image would reach it."""
        if not any(block.layer_design.mixer.has_keys for block in self.blocks):  # those that pruning left
            _check_pool(global_pool)
        super().reset_classifier(num_classes, global_pool)

    def __prepare_scriptable__(self) -> nn.Module:
        from formix.models import script

        if not self.pos_antialias:
            raise ValueError(
                "A model of DINOv2's with transformers' positions has no TorchScript form; use torch.export."
            )
        return script.scriptable_vit(self, script.ScriptableViT)


class FormixVisionTransformerDistilled(_DesignedTrunk, VisionTransformerDistilled):  # type: ignore[misc]
    """timm's distilled DeiT with blocks of a `Design`."""

    def __prepare_scriptable__(self) -> nn.Module:
        from formix.models import script

        return script.scriptable_vit(self, script.ScriptableDistilledViT)


_CLASSES: dict[type, type] = {
    VisionTransformer: FormixVisionTransformer,
    VisionTransformerDistilled: FormixVisionTransformerDistilled,
}


def _check_pool(global_pool: str | None) -> None:
    """Raise `ValueError` for the class token of a design that mixes no tokens."""
    if global_pool == "token":
        raise ValueError("global_pool is 'token', but this design mixes no tokens: pool by 'avg' instead.")


class _BlockArguments(nn.Identity):
    """Stands where a block will be and remembers what timm would build it with."""

    def __init__(self, depth: int = 0, attn_layer: Any = None, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments


def create_vit(name: str, design: str | Design = "softmax", *, pretrained: bool = False, **kwargs: Any) -> Any:
    """timm's model `name` with its blocks in `design`; `kwargs` go to timm (img_size, patch_size, in_chans, ...), but
    for `norm_eps`, the eps of all LayerNorms where it is not timm's (ViTs of transformers have 1e-12), and
    `pos_antialias`, False for DINOv2 of transformers (without registers), which resamples positions without.

    Names whose blocks are of their own kind (rotary positions, relative position biases, parallel branches) keep timm's
    blocks with the design's mixer inside: `formix.models.own_blocks`.

    A design that mixes no tokens (Activator) leaves a class token untouched by the image, so such models pool by
    the mean of the tokens unless told otherwise.

    Raises:
        ValueError: `name` is no Vision Transformer of timm's that formix knows, or the design does not fit.
    """
    from formix.models import own_blocks

    if kwargs.pop("features_only", False):
        if pretrained:
            raise ValueError(
                "features_only is for fresh weights here: save the pretrained model with formix.save and take the "
                "features of its directory, timm.create_model('local-dir:DIR', pretrained=True, features_only=True)."
            )
        return timm.create_model("formix_vit", base=name, design=design, features_only=True, **kwargs)
    chosen, checkpoint = find_design(design), kwargs.pop("checkpoint_path", "")
    asked, norm_eps = kwargs, kwargs.get("norm_eps")
    kwargs = {k: v for k, v in kwargs.items() if k not in ("norm_eps", "pos_antialias")}
    probe = _probe(name, kwargs)
    depth, kind = len(probe.blocks), own_blocks.kind_of(probe)
    layers = [chosen.layer(i, depth) for i in range(depth)]
    if kind is None and not chosen.mixes_tokens(depth):
        if isinstance(probe, VisionTransformerDistilled):
            raise ValueError(
                f"{name!r} reads two tokens of its own, and this design mixes no tokens: no image gets there."
            )
        _check_pool(kwargs.get("global_pool"))
        if probe.global_pool == "token":
            _log.warning("%s: the design mixes no tokens, so the classifier pools by 'avg' and not by 'token'", name)
            kwargs, asked = {**kwargs, "global_pool": "avg"}, {**asked, "global_pool": "avg"}

    if kind is None:
        model = _plain(name, kwargs, layers)
    else:
        model = timm.create_model(name, **kwargs)
        own_blocks.convert(model, kind, chosen)
    model.design, model.base = chosen, name
    model.arguments = {k: v for k, v in asked.items() if k not in RUNTIME_ARGUMENTS}
    size = (model.in_chans, *model.patch_embed.img_size)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": size, "architecture": "formix_vit"}
    model._model_args = {"base": name, "design": chosen.to_dict(), **model.arguments}  # for timm's save_for_hf
    if "pos_antialias" in asked:
        model.pos_antialias = asked["pos_antialias"]
    if norm_eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
    if pretrained:
        _carry_over(timm.create_model(name, pretrained=True, **kwargs), model)
    if checkpoint:
        load_checkpoint(model, checkpoint)  # of this design, when its blocks are there
    return model


def _plain(name: str, kwargs: dict[str, Any], layers: list[LayerDesign]) -> Any:
    """A model of timm's with formix's blocks in place of its plain ones."""
    init = kwargs.get("weight_init", "")
    model: Any = timm.create_model(name, **{**kwargs, "block_fn": _BlockArguments, "weight_init": "skip"})
    model.__class__ = _CLASSES[type(model)]  # the trunk is timm's own in all but how it runs the blocks
    blocks = [FormixBlock(**b.arguments, design=layer) for b, layer in zip(model.blocks, layers, strict=True)]
    model.blocks = BlockStack(*blocks)
    if init != "skip":
        model.weight_init_mode = init
        model.init_weights(needs_reset=False)
    return model


_TAKE_WEIGHT_INIT = ("vision_transformer", "vision_transformer_relpos", "deit")  # modules of timm


def without_weights(name: str, **kwargs: Any) -> Any:
    """The model that timm would build, without weights: on the meta device, where drawing them takes most of the time
    and changes nothing."""
    known = timm.is_model(name) and timm.model_entrypoint(name).__module__.rpartition(".")[2] in _TAKE_WEIGHT_INIT
    return timm.create_model(name, **{**({"weight_init": "skip"} if known else {}), **kwargs, "device": "meta"})


def _probe(name: str, kwargs: dict[str, Any]) -> Any:
    """The model that timm would build, without weights, checked to be one whose blocks can be replaced."""
    from formix.models import own_blocks

    if "block_fn" in kwargs or "attn_layer" in kwargs:
        raise ValueError("block_fn and attn_layer are what the design decides; leave them out.")
    check_sizes(kwargs)
    try:
        probe = without_weights(name, **kwargs)
    except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"timm cannot build {name!r} with {kwargs}: {reason}") from None
    known = own_blocks.kind_of(probe) is not None
    if type(probe) not in _CLASSES and not known:
        raise ValueError(
            f"{name!r} is a {type(probe).__name__}; formix knows the blocks of timm's Vision Transformer names, "
            "such as 'vit_small_patch16_224' or 'deit_tiny_patch16_224'."
        )
    if probe.patch_embed.num_patches == 0:
        size, patch = probe.patch_embed.img_size, probe.patch_embed.patch_size
        raise ValueError(f"img_size is {size} and patch_size {patch}; an image must hold at least one patch.")
    block = probe.blocks[0]
    if not known and (type(block) is not Block or type(block.attn) is not Attention):
        own = type(block).__name__ if type(block) is not Block else type(block.attn).__name__
        raise ValueError(f"{name!r} has blocks of its own ({own}); choose a VisionTransformer with timm's plain Block.")
    return probe


def _carry_over(source: nn.Module, model: nn.Module) -> None:
    """Load the source's weights, all that have a place; refuse if a weight of the model would stay random."""
    result = model.load_state_dict(source.state_dict(), strict=False)
    if result.missing_keys:
        raise ValueError(
            f"pretrained=True leaves {len(result.missing_keys)} weights of this design random "
            f"({', '.join(result.missing_keys[:3])}, ...); load a checkpoint of this design instead."
        )
    if result.unexpected_keys:
        _log.warning("pretrained weights without a place in this design: %s", ", ".join(result.unexpected_keys))


def build_for_timm(pretrained: bool = False, **kwargs: Any) -> FormixVisionTransformer | FeatureGetterNet:
    """`create_vit` with the arguments that timm's factory passes; `base` and `design` are in a saved config.json."""
    if pretrained and "design" not in kwargs:
        raise ValueError("pretrained=True needs the design that the weights were trained in; the config has none.")
    base, design = kwargs.pop("base", "vit_small_patch16_224"), kwargs.pop("design", "softmax")
    features = kwargs.get("features_only", False)
    model = build_model_with_cfg(
        functools.partial(create_vit, base, design),
        base,
        pretrained,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        pretrained_filter_fn=lambda state, model: model.adapt_checkpoint(state),
        **kwargs,
    )
    if not features:
        model.pretrained_cfg["architecture"] = "formix_vit"  # what timm's save_for_hf makes it again by, not the base's
    if pretrained and not features:
        remember_record(model, model.pretrained_cfg.get("file"))
    return model
