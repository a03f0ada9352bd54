"""What a conversion needs to know of a source model, whichever library it comes from."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import DropPath, PatchDropout, pos_embed_sincos
from torch import nn

from formix.conversion.weight_map import Move
from formix.design import Design

FAMILIES = (
    "timm's VisionTransformer (vit, deit, DINOv2), VisionTransformerRelPos, Eva (DINOv3, EVA-02, RoPE-ViT) and Xcit; "
    "transformers' BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ViT, DeiT, DINOv2, DINOv3, GPT-2, Llama, Qwen2, "
    "Qwen3 and Mistral; and formix's own models"
)
TRAINING_ALONE = (nn.Dropout, DropPath, PatchDropout, nn.Identity)  # the identity when a model is evaluated
# parts of which another module or function took hold: in the name of a tensor -> what it is and what to do
REWRITTEN = {
    r"(^|\.)_orig_mod\.": "a compiled part; convert the model as it was before torch.compile, each part's _orig_mod.",
    r"\.parametrizations\.": "a parametrised part; call parametrize.remove_parametrizations on it first.",
    r"\.(weight|bias)_mask$": "a pruned part; call torch.nn.utils.prune.remove on it first.",
    r"\.weight_g$": "a part with weight norm; call torch.nn.utils.remove_weight_norm on it first.",
}


@dataclass(kw_only=True)
class Source:
    """A source model's weights and how to build formix's model for them."""

    family: str  # "bert", "vit", ...
    depth: int  # layers
    causal: bool  # a decoder
    design: Design | None  # its own; None: its mixer is none of formix's
    build: Callable[[Design], Any]  # formix's model in a design, as its constructor initialises it
    rebuild: Callable[[], Any]  # the source as its configuration says it, as its constructor initialises it
    description: dict[str, Any]  # plain data that says which class and configuration it was
    moves: list[Move] = field(default_factory=list)
    unplaced: list[str] = field(default_factory=list)  # tensors that formix's model has no place for in any design


def open_source(model: Any) -> Source:
    """The source for a model in memory.

    Raises:
        ValueError: a model that cannot be converted, with the reason.
    """
    refuse_wrapped(model)
    source = _open(model)
    with torch.device("meta"):
        stock = source.rebuild()
    refuse_changed(model, stock)
    return source


def _open(model: Any) -> Source:
    module = type(model).__module__
    if module.startswith("formix."):
        from formix.conversion.formix_source import open_formix

        return open_formix(model)
    if module.startswith("timm."):
        from formix.conversion.timm_source import open_timm

        return open_timm(model)
    if module.startswith("transformers."):
        from formix.conversion.transformers_source import open_transformers

        return open_transformers(model)
    raise unknown_family(model)


def unknown_family(model: Any) -> ValueError:
    return ValueError(f"A {type(model).__name__} is of no family that formix converts; it knows {FAMILIES}.")


def refuse_wrapped(model: Any) -> None:
    """Raise `ValueError` for a model whose weights are not plain parameters of its own modules."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"The source is a {type(model).__name__}; give a model, or a name or directory of one.")
    wrapper = type(model).__name__
    if wrapper == "OptimizedModule":
        raise ValueError("The source is compiled; convert the model before torch.compile, or its _orig_mod.")
    if wrapper in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"):
        raise ValueError(f"The source is wrapped in {wrapper}; convert the model inside it (its .module).")
    if any(
        "FullyShardedDataParallel" in type(m).__name__ or type(m).__name__.startswith("FSDP") for m in model.modules()
    ):
        raise ValueError("The source is sharded by FSDP; gather its weights in an unwrapped model and convert that.")
    if shard := next((name for name, p in model.named_parameters() if type(p.data).__name__ == "DTensor"), None):
        raise ValueError(
            f"The source's {shard} is sharded over processes; gather them in a model of its own and convert that."
        )
    if hasattr(model, "peft_config"):
        raise ValueError("The source carries adapters; merge them (merge_and_unload) and convert the result.")
    quantised = getattr(model, "quantization_method", None) or getattr(
        getattr(model, "config", None), "quantization_config", None
    )
    packed = any(
        p.itemsize == 1  # float8 too
        or not (p.is_floating_point() or p.is_complex())
        or type(p).__name__ in ("Params4bit", "Int8Params")
        for p in model.parameters()
    ) or any("quantized" in type(m).__module__ for m in model.modules())
    if quantised or packed:
        raise ValueError("The source is quantised; load it without quantisation and convert that.")
    if absent := next((name for name, p in model.named_parameters() if p.is_meta), None):
        raise ValueError(
            f"The source's weights are not in memory ({absent} is on the meta device, offloaded or never loaded); load "
            "it whole, without device_map and offloading, and convert that."
        )
    kinds: dict[torch.dtype, str] = {}
    for name, p in model.named_parameters():
        kinds.setdefault(p.dtype, name)
    if len(kinds) > 1:
        found = ", ".join(f"{name} in {dtype}" for dtype, name in kinds.items())
        raise ValueError(
            f"The source's weights are of several types ({found}), and a conversion has one; bring them to the widest "
            "with model.float() and convert that."
        )
    for name in model.state_dict():
        for pattern, what in REWRITTEN.items():
            if re.search(pattern, name):
                raise ValueError(f"The source's {name} is of {what}")


def refuse_changed(model: nn.Module, stock: nn.Module) -> None:
    """Raise `ValueError` for a model that is not what its configuration says, `stock`: the rest would be lost."""
    theirs, known = _parts(model), _parts(stock)
    for part in known | theirs:
        if theirs.get(part) != known.get(part):
            raise ValueError(
                f"The source has {theirs.get(part, 'nothing')} as {part}, and a new {type(model).__name__} of its "
                f"configuration has {known.get(part, 'nothing')}; the conversion would lose what the configuration "
                "does not say. Build the source from one that says it."
            )
    state, first = model.state_dict(), dict[int, str]()
    for name, tensor in stock.state_dict(keep_vars=True).items():
        other = first.setdefault(id(tensor), name)
        if other != name and not torch.equal(state[name].nan_to_num(), state[other].nan_to_num()):
            raise ValueError(
                f"The source's {name} differs from {other}, and its configuration ties the two; set "
                "tie_word_embeddings to False in a configuration and build the source from that."
            )


def _parts(model: nn.Module) -> dict[str, str]:
    """Shapes of tensors; activations, norms and other functions, which no shape tells apart, with their settings."""
    shapes = {name: f"a tensor {list(tensor.shape)}" for name, tensor in model.state_dict().items()}
    return shapes | {
        name: repr(module) + _positions(module)
        for name, module in model.named_modules()
        if not any(module.children()) and not isinstance(module, TRAINING_ALONE)
    }


def _positions(module: nn.Module) -> str:
    """The settings of timm's rotary positions, which their repr does not say."""
    if type(module).__module__ != pos_embed_sincos.__name__:
        return ""
    settings = {
        name: value
        for name, value in sorted(vars(module).items())
        if isinstance(value, int | float | str | tuple) and name not in ("training", "aug_active") and name[0] != "_"
    }
    return f" of {settings}"


def like(target: nn.Module, source: nn.Module) -> Any:
    """`target` with the source's device and floating-point type."""
    parameter = next(source.parameters(), torch.empty(0))
    return cast(target, parameter.device, parameter.dtype)


def cast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """The model there and in that type. Buffers that are computed and not stored are as its library loads them: those
    of transformers (rotary frequencies) stay exact, timm's are of the weights' type, which its blocks rely on."""
    stored = model.state_dict().keys()
    exact = {name: buffer for name, buffer in model.named_buffers() if hasattr(model, "config") and name not in stored}
    model.to(device=device, dtype=dtype)
    if torch.promote_types(dtype, torch.float32) != dtype:
        for name, buffer in exact.items():
            place, _, own = name.rpartition(".")
            setattr(model.get_submodule(place), own, buffer.to(device))
    return model
