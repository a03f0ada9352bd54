"""Sources of transformers: text models on formix's families, image models on timm's trunk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import transformers

from formix.conversion.source import Source, unknown_family
from formix.conversion.weight_map import ROWS, SAME, Rule, resolve
from formix.design import Design

_log = logging.getLogger("formix")

# model type -> (formix's family, fields of its config that the source's has not)
TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {}),
    "xlm-roberta": ("roberta", {}),
    "camembert": ("roberta", {}),
    "distilbert": ("distilbert", {}),
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
    "qwen2": ("llama", {"qkv_bias": True, "attention_bias": False}),
    "qwen3": ("llama", {"qk_rms_norm": True}),
    "mistral": ("llama", {}),
}
_STEMS = {  # of the names of classes: theirs and their family's
    "xlm-roberta": ("XLMRoberta", "Roberta"),
    "camembert": ("Camembert", "Roberta"),
    "qwen2": ("Qwen2", "Llama"),
    "qwen3": ("Qwen3", "Llama"),
    "mistral": ("Mistral", "Llama"),
}
IMAGES = ("vit", "deit", "dinov2", "dinov2_with_registers")
_PRE, _LAYER, _W = r"(?:\w+\.)?", r"(?P<i>\d+)", r"(?P<w>weight|bias)"


def _distilbert(theirs: str, ours: str) -> Rule:
    pattern = rf"(?P<p>{_PRE})transformer\.layer\.{_LAYER}\.{theirs}\.{_W}"
    return Rule(sources=(pattern,), target=f"{{p}}encoder.layer.{{i}}.{ours}.{{w}}")


DISTILBERT = (
    _distilbert(r"attention\.q_lin", "attention.self.query"),
    _distilbert(r"attention\.k_lin", "attention.self.key"),
    _distilbert(r"attention\.v_lin", "attention.self.value"),
    _distilbert(r"attention\.out_lin", "attention.output.dense"),
    _distilbert(r"sa_layer_norm", "attention.output.LayerNorm"),
    _distilbert(r"ffn\.lin1", "intermediate.dense"),
    _distilbert(r"ffn\.lin2", "output.dense"),
    _distilbert(r"output_layer_norm", "output.LayerNorm"),
    Rule(sources=(rf"(?P<n>(?!{_PRE}transformer\.layer\.).*)",), target="{n}"),
)
LLAMA = (  # heads for question answering call their trunk transformer, all others and formix's model
    Rule(sources=(r"transformer\.(?P<n>.*)",), target="model.{n}"),
    Rule(sources=(r"(?P<n>(?!transformer\.).*)",), target="{n}"),
)
SAME_NAMES = (Rule(sources=(r"(?P<n>.*)",), target="{n}"),)
RULES = {"distilbert": DISTILBERT, "llama": LLAMA}  # of formix's families; the others have the source's names


def _image(theirs: str, ours: str, operation: str = SAME) -> Rule:
    return Rule(sources=(_PRE + theirs,), target=ours, operation=operation)


def _block(theirs: tuple[str, ...], ours: str, operation: str = SAME) -> Rule:
    layer = rf"{_PRE}(?:encoder\.)?layers?\.{_LAYER}\."
    return Rule(
        sources=tuple(rf"{layer}{part}\.{_W}" for part in theirs),
        target=f"blocks.{{i}}.{ours}.{{w}}",
        operation=operation,
    )


# roles by all the names that transformers has given them
IMAGE = (
    _image(r"embeddings\.cls_token", "cls_token"),
    _image(r"embeddings\.register_tokens", "reg_token"),
    _image(rf"embeddings\.patch_embeddings\.projection\.{_W}", "patch_embed.proj.{w}"),
    _block((r"(?:layernorm_before|norm1)",), "norm1"),
    _block((r"(?:layernorm_after|norm2)",), "norm2"),
    _block(
        tuple(
            rf"attention\.(?:attention\.)?(?:{new}|{old})"
            for new, old in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
        ),
        "attn.qkv",
        ROWS,
    ),
    _block((r"attention\.(?:o_proj|output\.dense)",), "attn.proj"),
    _block((r"(?:mlp\.fc1|intermediate\.dense)",), "mlp.fc1"),
    _block((r"(?:mlp\.fc2|output\.dense)",), "mlp.fc2"),
    *(
        Rule(
            sources=(rf"{_PRE}(?:encoder\.)?layers?\.{_LAYER}\.layer_scale{n}\.lambda1",),
            target=f"blocks.{{i}}.ls{n}.gamma",
        )
        for n in (1, 2)
    ),
    _image(rf"layernorm\.{_W}", "norm.{w}"),
    Rule(sources=(rf"(?:classifier|cls_classifier)\.{_W}",), target="head.{w}"),
    Rule(sources=(rf"distillation_classifier\.{_W}",), target="head_dist.{w}"),
)
_TIMM_ACTIVATIONS = {
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def open_transformers(model: Any) -> Source:
    """The source for a model of transformers'.

    Raises:
        ValueError: a family that formix does not know, or a head that its models have not.
    """
    kind = str(getattr(model.config, "model_type", ""))
    if kind in TEXT:
        return _text(model, *TEXT[kind])
    if kind in IMAGES:
        return _image_source(model, kind)
    if kind == "dinov3_vit":
        from formix.conversion.dinov3 import open_dinov3

        return open_dinov3(model)
    raise unknown_family(model)


def _text(model: Any, family: str, more: dict[str, Any]) -> Source:
    from formix.models.text import DECODERS, FAMILIES

    config_class, classes = FAMILIES[family]
    theirs, ours = _STEMS.get(model.config.model_type, ("", ""))
    plain = {c.__name__.removeprefix("Formix").replace(ours, theirs, 1): c for c in classes.values()}
    model_class = plain.get(type(model).__name__)
    if model_class is None:
        raise ValueError(
            f"A {type(model).__name__} has a head that formix does not have; load the source as another (--task): "
            f"{', '.join(plain)}."
        )
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")} | more
    if fields.pop("output_attentions", False):
        _log.warning("The source's config asks for attention weights, which formix never forms: the model's does not.")
    if model.config.model_type == "mistral" and model.config.sliding_window:
        fields["layer_types"] = ["sliding_attention"] * model.config.num_hidden_layers

    def build(design: Design) -> Any:
        built = model_class(config_class(**fields, design=design.to_dict()))
        trunk = getattr(model, model.base_model_prefix, model)
        if hasattr(trunk, "pooler") and trunk.pooler is None:  # BertModel(add_pooling_layer=False)
            getattr(built, built.base_model_prefix, built).pooler = None
        return built

    return source_of(model, family, build, RULES.get(family, SAME_NAMES), causal=family in DECODERS)


def source_of(
    model: Any, family: str, build: Callable[[Design], Any], rules: Iterable[Rule], *, causal: bool = False
) -> Source:
    """The source for a model of transformers', whose tensors the rules place in what `build` builds."""
    moves, unplaced = resolve(rules, model.state_dict())
    description = describe(model)
    return Source(
        family=family,
        depth=model.config.num_hidden_layers,
        causal=causal,
        design=Design(),
        build=build,
        rebuild=lambda: rebuild(description),
        description=description,
        moves=moves,
        unplaced=unplaced,
    )


def _image_source(model: Any, kind: str) -> Source:
    from formix.conversion.timm_source import pooled
    from formix.models.vit import create_vit

    config = model.config
    name = type(model).__name__
    if name not in _IMAGE_CLASSES:
        raise ValueError(
            f"A {name} has a head that timm's trunk does not have; load the source as another (--task): "
            f"{', '.join(_IMAGE_CLASSES)}."
        )
    if getattr(config, "use_swiglu_ffn", False):
        raise ValueError("This DINOv2 has a SwiGLU FFN; convert timm's vit_giant_patch14_dinov2 instead.")
    if config.hidden_act not in _TIMM_ACTIVATIONS:
        raise ValueError(f"hidden_act is {config.hidden_act!r}; timm's trunk has {', '.join(_TIMM_ACTIVATIONS)}.")
    distilled = name == "DeiTForImageClassificationWithTeacher"
    deit, rules = kind == "deit", list(IMAGE)
    token = "dist_token" if distilled else "reg_token"
    rules.append(_image(r"embeddings\.distillation_token", token))
    registers = getattr(config, "num_register_tokens", 0)
    # timm adds position embeddings to register tokens too, transformers does not
    operation = f"zero_rows(1,{registers})" if registers else SAME
    rules.append(_image(r"embeddings\.position_embeddings", "pos_embed", operation))
    classifies = not {"classifier.weight", "cls_classifier.weight"}.isdisjoint(model.state_dict())
    width = config.hidden_size
    hidden = getattr(config, "intermediate_size", None) if not hasattr(config, "mlp_ratio") else None
    arguments: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (hidden + 0.5) / width if hidden else config.mlp_ratio,  # timm takes the whole part
        "qkv_bias": config.qkv_bias,
        "act_layer": _TIMM_ACTIVATIONS[config.hidden_act],
        "num_classes": config.num_labels if classifies else 0,
        "norm_eps": config.layer_norm_eps,
    }
    if kind.startswith("dinov2"):
        arguments |= {"init_values": 1.0, "dynamic_img_size": True}
    if kind == "dinov2":  # with registers transformers resamples positions as timm does
        arguments["pos_antialias"] = False
    if registers or (deit and not distilled):
        arguments["reg_tokens"] = registers or 1
    base = "deit_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224"

    def build(design: Design) -> Any:
        return create_vit(
            base, design, **(arguments if distilled else pooled(arguments, design, config.num_hidden_layers))
        )

    return source_of(model, kind, build, rules)


_IMAGE_CLASSES = (
    "ViTModel",
    "ViTForImageClassification",
    "DeiTModel",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
)


def describe(model: Any) -> dict[str, Any]:
    """Class and configuration as plain data, for `rebuild`."""
    trunk = getattr(model, model.base_model_prefix, model)
    return {
        "library": "transformers",
        "class": type(model).__name__,
        "config": model.config.to_dict(),
        "pooler": getattr(trunk, "pooler", None) is not None,
    }


def rebuild(description: dict[str, Any]) -> Any:
    """transformers' own class again."""
    model_class = getattr(transformers, description["class"])
    model = model_class(model_class.config_class.from_dict(dict(description["config"])))
    trunk = getattr(model, model.base_model_prefix, model)
    if hasattr(trunk, "pooler") and not description["pooler"]:
        trunk.pooler = None
    return model
