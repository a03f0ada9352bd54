"""Faster or smaller: autocast, recomputed activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What to compute in, None for the weights' own float32; "auto": bfloat16 where the hardware multiplies it."""
    if precision == "auto":
        if torch.cuda.is_available():
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else None
    return None if precision == "float32" else getattr(torch, precision)


def computed_in(precision: str) -> str:
    """The name of the type that `autocast_dtype` says: what "auto" is depends on the hardware."""
    return str(autocast_dtype(precision) or torch.float32).removeprefix("torch.")


def recompute_activations(model: nn.Module) -> None:
    """Keep only every block's input for the backward pass and compute the rest again there, where the model can.

    Raises:
        ValueError: a model without such a switch.
    """
    parts: Any = model
    if hasattr(parts, "set_grad_checkpointing"):  # timm's name
        parts.set_grad_checkpointing()
    elif getattr(parts, "supports_gradient_checkpointing", False):  # transformers'
        name = "activation_checkpointing_enable"
        enable = getattr(parts, name, None) or parts.gradient_checkpointing_enable  # its name before 5.24
        enable({"use_reentrant": False})
    else:
        raise ValueError(
            f"A {type(model).__name__} cannot recompute its activations; leave activation_checkpointing off."
        )
