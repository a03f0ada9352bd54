"""The image models of the papers by name: sizes and inputs as data, and the module that builds each.

This module imports nothing of timm's: its names are registered while timm itself is still being imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SYMMETRIC = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # pixels to [-1, 1]


@dataclass(frozen=True, kw_only=True)
class Published:
    """One name: who builds it, with what, for which images."""

    module: str  # has build(name, **arguments)
    arguments: dict[str, Any] = field(default_factory=dict)
    cfg: dict[str, Any] = field(default_factory=dict)  # timm's description of input and classifier


def timm_cfg(size: int, classes: int, first_conv: str, classifier: str, statistics: dict[str, Any]) -> dict[str, Any]:
    """timm's description of a model."""
    return {
        "url": "",
        "input_size": (3, size, size),
        "fixed_input_size": True,
        "num_classes": classes,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": first_conv,
        "classifier": classifier,
        **statistics,
    }


# ------------------------------------------------------------------------------------------ SimA (arXiv 2206.08898)

# name: width C, depth, heads H, initial layer scale eta, whether class blocks normalise all tokens
_SIMA = {
    "nano_12": (128, 12, 4, 1.0, False),
    "tiny_12": (192, 12, 4, 1.0, True),
    "small_12": (384, 12, 8, 1.0, True),
    "tiny_24": (192, 24, 4, 1e-5, True),
    "small_24": (384, 24, 8, 1e-5, True),
    "medium_24": (512, 24, 8, 1e-5, True),
    "large_24": (768, 24, 16, 1e-5, True),
}


def _sima(size: tuple[int, int, int, float, bool], patch: int) -> Published:
    width, depth, heads, eta, tokens_norm = size
    return Published(
        module="formix.models.xcit",
        arguments={
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "eta": eta,
            "tokens_norm": tokens_norm,
        },
        cfg=timm_cfg(224, 1000, "patch_embed.proj.0.0", "head", IMAGENET),
    )


SIMA = {f"sima_{name}_p{patch}": _sima(size, patch) for name, size in _SIMA.items() for patch in (16, 8)}

# ------------------------------------------- Activator, Uniform Activator, NiNformer (arXiv 2405.15953, 2403.02411)


def _activator(kind: str) -> Published:
    return Published(
        module="formix.models.activator",
        arguments={"kind": kind},
        cfg=timm_cfg(32, 10, "patcher", "classifier", SYMMETRIC),
    )


ACTIVATOR = {
    "activator_32_p4": _activator("activator"),
    "activator_glu_32_p4": _activator("activator_glu"),
    "uniform_activator_32_p4": _activator("uniform"),
    "ninformer_32_p4": _activator("ninformer"),
}

# ------------------------------------------------------------------------- ReLU attention in ViT (arXiv 2309.08586)


def _relu_vit(size: str, patch: int) -> Published:
    return Published(
        module="formix.models.relu_vit",
        arguments={"base": f"vit_{size}_patch{patch}_224"},
        cfg=timm_cfg(224, 1000, "patch_embed.proj", "head", SYMMETRIC),
    )


RELU_VIT = {
    f"relu_vit_{size}_patch{patch}_224": _relu_vit(size, patch)
    for size, patch in (("small", 32), ("small", 16), ("small", 8), ("base", 32), ("base", 16), ("large", 16))
}

PUBLISHED: dict[str, Published] = {**SIMA, **ACTIVATOR, **RELU_VIT}


def create_published(name: str, design: Any = None, *, pretrained: bool = False, **kwargs: Any) -> Any:
    """The published model `name`, in another design if one is given and the architecture allows it.

    Raises:
        ValueError: no published weights, an unknown argument, or a design that the model cannot have.
    """
    import timm

    if pretrained:
        raise ValueError(
            f"No weights of {name!r} are published; load a checkpoint with formix.models.image.load_official."
        )
    if design is not None:
        kwargs["design"] = design
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{name!r} cannot be built with {kwargs}: {error}") from None
