"""The source for DINOv3's Vision Transformer of transformers, on timm's Eva."""

from __future__ import annotations

from typing import Any

from formix.conversion.source import Source
from formix.conversion.transformers_source import source_of
from formix.conversion.weight_map import ROWS, Rule
from formix.design import Design

_LAYER, _W = r"model\.layer\.(?P<i>\d+)\.", r"(?P<w>weight|bias)"
_NAMES = {  # in a layer
    "norm1": "norm1",
    r"attention\.o_proj": "attn.proj",
    "norm2": "norm2",
    r"mlp\.gate_proj": "mlp.fc1_g",
    r"mlp\.down_proj": "mlp.fc2",
}


def open_dinov3(model: Any) -> Source:
    """The source for a `DINOv3ViTModel`.

    Raises:
        ValueError: another class of the family, or a config that timm's Eva cannot be built for.
    """
    from formix.models.vit import create_vit

    config, gated = model.config, model.config.use_gated_mlp
    if type(model).__name__ != "DINOv3ViTModel":
        raise ValueError(f"A {type(model).__name__} is no plain DINOv3; load the source with --task=DINOv3ViTModel.")
    if config.hidden_act != (act := "silu" if gated else "gelu"):
        raise ValueError(f"hidden_act is {config.hidden_act!r}; timm's trunk has {act!r} with use_gated_mlp={gated}.")
    if config.key_bias or config.query_bias != config.value_bias or not (config.proj_bias and config.mlp_bias):
        raise ValueError(
            "timm's trunk has biases of queries and values (both or none), of the output projection and of the FFN, "
            f"and none of keys; this model has query_bias={config.query_bias}, key_bias={config.key_bias}, "
            f"value_bias={config.value_bias}, proj_bias={config.proj_bias} and mlp_bias={config.mlp_bias}."
        )
    arguments: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "num_classes": 0,
        "global_pool": "token",
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,  # timm takes the whole part
        "swiglu_mlp": gated,
        "swiglu_align_to": 1 if gated else 0,  # any but 0: gate and value are two projections
        "num_reg_tokens": config.num_register_tokens,
        "rope_temperature": config.rope_theta,
        "rope_shift_coords": config.pos_embed_shift,
        "rope_jitter_coords": config.pos_embed_jitter,
        "rope_rescale_coords": config.pos_embed_rescale,
        "norm_eps": config.layer_norm_eps,
    }
    name = "vit_small_patch16_dinov3_qkvb" if config.query_bias else "vit_small_patch16_dinov3"

    def build(design: Design) -> Any:
        return create_vit(name, design, **arguments)

    return source_of(model, "dinov3", build, _rules(gated))


def _rules(gated: bool) -> list[Rule]:
    names = {**_NAMES, r"mlp\.up_proj": "mlp.fc1_x" if gated else "mlp.fc1"}
    return [
        Rule(sources=(r"embeddings\.cls_token",), target="cls_token"),
        Rule(sources=(r"embeddings\.register_tokens",), target="reg_token"),
        Rule(sources=(rf"embeddings\.patch_embeddings\.{_W}",), target="patch_embed.proj.{w}"),
        *(Rule(sources=(rf"{_LAYER}{a}\.{_W}",), target=f"blocks.{{i}}.{b}.{{w}}") for a, b in names.items()),
        Rule(
            sources=tuple(rf"{_LAYER}attention\.{part}_proj\.weight" for part in "qkv"),
            target="blocks.{i}.attn.qkv.weight",
            operation=ROWS,
        ),
        *(
            Rule(sources=(rf"{_LAYER}attention\.{part}_proj\.bias",), target=f"blocks.{{i}}.attn.{part}_bias")
            for part in "qv"
        ),
        *(Rule(sources=(rf"{_LAYER}layer_scale{n}\.lambda1",), target=f"blocks.{{i}}.gamma_{n}") for n in (1, 2)),
        Rule(sources=(rf"norm\.{_W}",), target="norm.{w}"),
    ]
