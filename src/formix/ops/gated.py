"""The gated unit of Activator: a GLU that takes the place of attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def gated_unit(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor | None,
    weight_2: Tensor,
    bias_2: Tensor | None,
    weight_3: Tensor,
    bias_3: Tensor | None,
    *,
    activation: str = "gelu",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_2_weight: Tensor | None = None,
    norm_2_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = (u * v) W3 + b3 with u = N(act(x W1 + b1)) and v = N2(x W2 + b2) (Activator, arXiv 2405.15953).

    Every token is treated by itself: nothing is mixed between tokens.

    Args:
        x: [..., C]; weight_1, weight_2: [F, C]; weight_3: [C, F]; biases [F], [F], [C] or None.
        activation: gelu (exact), silu, relu, sigmoid or identity.
        norm_weight, norm_bias: [F], an inner LayerNorm N *after* the activation, as the official code has it; None:
            none, the textbook unit.
        norm_2_weight, norm_2_bias: [F], the norm of the second branch; None: the first one's again, which is
            the official tying.
        eps: of the inner norms.

    Returns:
        [..., C].

    Raises:
        ValueError: an unknown activation, or shapes that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(map(repr, ACTIVATIONS))}.")
    f, c = weight_1.shape
    if x.shape[-1] != c or weight_2.shape != (f, c) or weight_3.shape[1] != f:
        raise ValueError(
            f"x has {x.shape[-1]} channels and the weights shapes {list(weight_1.shape)}, {list(weight_2.shape)} and "
            f"{list(weight_3.shape)}; they must be [F, C], [F, C] and [C, F]."
        )
    u = ACTIVATIONS[activation](F.linear(x, weight_1, bias_1))  # [..., F]
    v = F.linear(x, weight_2, bias_2)
    if norm_weight is not None:
        if norm_2_weight is None:
            norm_2_weight, norm_2_bias = norm_weight, norm_bias
        u = F.layer_norm(u, (f,), norm_weight, norm_bias, eps)
        v = F.layer_norm(v, (f,), norm_2_weight, norm_2_bias, eps)
    return F.linear(u * v, weight_3, bias_3)
