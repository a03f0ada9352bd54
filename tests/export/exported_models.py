"""Small models of every family, for export."""

from __future__ import annotations

from typing import Any

import torch
from text_families import SMALL, small

import formix

TEXT = tuple(SMALL)
# other image families than the plain ViT: name to create, arguments
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 24, "num_heads": 3, "img_size": 32}),
    "deit": ("deit_tiny_distilled_patch16_224", {"embed_dim": 24, "num_heads": 3, "img_size": 32}),
    "dinov2": (
        "vit_small_patch14_dinov2",
        {"embed_dim": 24, "num_heads": 3, "img_size": 28, "dynamic_img_size": True, "pos_antialias": False},
    ),
    "rope": ("vit_small_patch16_rope_224", {"img_size": 32}),
    "relpos": ("vit_relpos_small_patch16_224", {"img_size": 32}),
    "xcit": ("xcit_nano_12_p16_224", {"img_size": 32}),
    "sima": ("sima_nano_12_p16", {"embed_dim": 16, "num_heads": 2, "img_size": 32}),
    "relu_vit": (
        "relu_vit_small_patch16_224",
        {"embed_dim": 24, "num_heads": 3, "img_size": 32, "head_zero_init": False},
    ),
    "activator": ("activator_32_p4", {"embed_dim": 16, "hidden_dim": 24}),
    "ninformer": ("ninformer_32_p4", {"embed_dim": 16, "hidden_dim": 24}),
    "cvt": ("cvt-13", {"depth": [1, 1, 2], "embed_dim": [16, 32, 32], "num_heads": [1, 2, 2]}),
}


def model_of(family: str, design: str | None = None, **more: Any) -> Any:
    """A small model in evaluation mode."""
    torch.manual_seed(0)
    if family in TEXT:
        layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
        return small(family, design or "softmax", **{layers: 2, **more})
    name, arguments = IMAGES[family]
    depth = {} if family == "cvt" else {"depth": 2}
    arguments = {**depth, "num_classes": 5, **arguments, **more}
    return formix.create_model(name, design=design, **arguments).eval()


def possible(family: str) -> list[str]:
    """The designs that a family can have; what it refuses is tested with the models."""
    refused = {"sima", "activator", "activator-glu"} if family in ("gpt2", "llama") else set()
    return [name for name in formix.list_designs() if name not in refused]
