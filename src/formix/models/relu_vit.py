"""Vision Transformers with ReLU attention ("Replacing softmax with ReLU in Vision Transformers", arXiv 2309.08586).

The paper trains big_vision's ViT with softmax replaced and nothing else changed: LayerNorm eps 1e-6, tanh GELU, a
learned position embedding for patches only, the final norm before pooling, mean pooling (ImageNet-21k) or a class token
with a tanh layer before the classifier (ImageNet-1k), scale-only norms of queries and keys. There is no code release;
`formix.models.big_vision` reads and writes the library's weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from formix.design import design as find_design
from formix.layers import Attention
from formix.models.image import ImageModel
from formix.models.published import RELU_VIT
from formix.models.vit import FormixVisionTransformer, create_vit


class ReluVisionTransformer(ImageModel, FormixVisionTransformer):  # type: ignore[misc]
    """big_vision's ViT in timm's words; `pre_logits` is the width x width layer with tanh before the classifier."""

    pre_logits: nn.Linear | None

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised tokens [B, N, C] -> logits [B, classes]."""
        x = self.fc_norm(self.pool(x))  # [B, C]
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def __prepare_scriptable__(self) -> nn.Module:
        from formix.models import script

        return script.scriptable_vit(self, script.ScriptableReluViT)

    def prune_intermediate_layers(
        self: Any, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's; the layer before the classifier goes with it."""
        if prune_head:
            self.pre_logits = None
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def adapt_checkpoint(self: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As timm's, which leaves out `pre_logits`: here it is a layer."""
        own = {name: tensor for name, tensor in state.items() if name.startswith("pre_logits.")}
        return FormixVisionTransformer.adapt_checkpoint(self, state) | own

    def saved_config(self: Any) -> dict[str, Any]:
        config = super().saved_config()
        config["model_args"] |= {
            "class_token": self.has_class_token,
            "fc_norm": not isinstance(self.fc_norm, nn.Identity),
            "rep_size": self.pre_logits is not None,
        }
        return config


def build(
    name: str,
    *,
    design: Any = None,
    global_pool: str = "avg",
    rep_size: bool = False,
    head_bias: float = 0.0,
    head_zero_init: bool = True,
    **arguments: Any,
) -> ReluVisionTransformer:
    """The ViT `name` (``relu_vit_small_patch16_224``).

    Args:
        design: another design than the paper's, such as "softmax", its baseline.
        global_pool: "avg", the paper's choice for ImageNet-21k, or "token" for ImageNet-1k, which adds a class token;
            also timm's others, of which "map" is big_vision's probe, and attends by softmax whatever the design.
        rep_size: a tanh layer before the classifier (ImageNet-1k).
        head_bias: initial bias of the classifier, for training with a sigmoid loss: -10 for ImageNet-21k, -6.9 for -1k.
        head_zero_init: start the classifier's weights at zero, as big_vision does.
        **arguments: options of the mixer (activation, length_exponent, length, qk_norm, gate) and timm's arguments.
            Without `design`, qk_norm is True.

    Raises:
        ValueError: one of timm's initialisations in `weight_init`, or what `create_vit` refuses.
    """
    if arguments.get("weight_init") not in (None, "", "skip"):
        raise ValueError(
            f"weight_init is {arguments['weight_init']!r}; {name} starts as big_vision's models do: leave it out, or "
            "pass 'skip' for weights that a checkpoint replaces."
        )
    given = dict(arguments)
    options = {k: arguments.pop(k) for k in _MIXER_OPTIONS if k in arguments}
    if design is None:
        design, options = "relu", {"qk_norm": True} | options
    chosen = find_design(design, **options)
    trunk: dict[str, Any] = {
        "class_token": global_pool == "token",
        "global_pool": global_pool,
        "no_embed_class": True,
        "fc_norm": False,
        "act_layer": "gelu_tanh",
        "weight_init": "skip",
    } | arguments
    model: Any = create_vit(RELU_VIT[name].arguments["base"], chosen, **trunk)
    model.__class__ = ReluVisionTransformer
    like = model.norm.weight
    width = model.embed_dim
    model.pre_logits = nn.Linear(width, width, device=like.device, dtype=like.dtype) if rep_size else None
    model.remember(name, {k: v for k, v in given.items() if k not in _MIXER_OPTIONS}, chosen)
    model._model_args = {}  # not the trunk's: timm's factory keeps those of this name, for its save_for_hf
    if arguments.get("weight_init") != "skip":
        initialize(model, head_bias=head_bias, head_zero_init=head_zero_init)
    return model


_MIXER_OPTIONS = ("activation", "length_exponent", "length", "qk_norm", "gate")


@torch.no_grad()
def initialize(model: Any, *, head_bias: float = 0.0, head_zero_init: bool = True) -> None:
    """big_vision's initialisation of a ViT.

    Projections of attention (queries, keys and values each by itself), gates and MLPs Xavier uniform; MLP biases
    N(0, 1e-6); other biases 0; patch embedding and `pre_logits` LeCun normal; positions N(0, 1 / sqrt(C)); class token
    0; classifier 0, or LeCun normal, with bias `head_bias`; norms 1 and 0. The attention that pools (`global_pool` is
    "map") and its probe are as the blocks'. Register tokens, which big_vision does not have, are timm's N(0, 1e-6).
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            _lecun_normal(module)
    mlps = [block.mlp for block in model.blocks if block.mlp is not None]
    weights: list[Any] = []
    for block in model.blocks:
        if isinstance(block.attn, Attention):
            weights += [block.attn.proj.weight, *block.attn.qkv.weight.chunk(3)]
            weights += [block.attn.gate.weight] if block.attn.gate is not None else []
        else:
            weights += [block.attn.fc1.weight, block.attn.fc2.weight, block.attn.fc3.weight]
    if isinstance(model.attn_pool, AttentionPoolLatent):
        pool = model.attn_pool
        weights += [pool.latent[0], pool.q.weight, *pool.kv.weight.chunk(2), pool.proj.weight]
        mlps.append(pool.mlp)
    for weight in weights + [linear.weight for mlp in mlps for linear in (mlp.fc1, mlp.fc2)]:
        nn.init.xavier_uniform_(weight)
    for bias in [linear.bias for mlp in mlps for linear in (mlp.fc1, mlp.fc2) if linear.bias is not None]:
        nn.init.normal_(bias, std=1e-6)
    if model.pos_embed is not None:
        nn.init.normal_(model.pos_embed, std=model.embed_dim**-0.5)
    if model.cls_token is not None:
        nn.init.zeros_(model.cls_token)
    if model.reg_token is not None:
        nn.init.normal_(model.reg_token, std=1e-6)
    if isinstance(model.head, nn.Linear):
        if head_zero_init:
            nn.init.zeros_(model.head.weight)
        nn.init.constant_(model.head.bias, head_bias)


def _lecun_normal(module: nn.Linear | nn.Conv2d) -> None:
    """Truncated normal of standard deviation 1 / sqrt(fan-in), and a bias of 0."""
    std = math.sqrt(1 / module.weight[0].numel()) / 0.87962566103423978  # the truncation at two sigma narrows it
    nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
