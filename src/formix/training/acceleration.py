"""Time for memory and back: recomputed activations, compiled models."""

from __future__ import annotations

from typing import Any

from torch import nn


def recompute_activations(model: nn.Module) -> None:
    """Keep only every block's input for the backward pass and compute the rest again there, where the model can.

    Raises:
        ValueError: a model without such a switch.
    """
    parts: Any = model
    if hasattr(parts, "set_grad_checkpointing"):  # timm's name
        parts.set_grad_checkpointing()
    elif getattr(parts, "supports_gradient_checkpointing", False):  # transformers'
        parts.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        raise ValueError(
            f"A {type(model).__name__} cannot recompute its activations; leave activation_checkpointing off."
        )
