"""The gated unit of Activator: a GLU that takes the place of attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from formix.ops.masks import DTYPES, check_layout, check_number

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
        ValueError: an unknown activation, or shapes, dtypes or devices that do not fit.
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(map(repr, ACTIVATIONS))}.")
    check_number("eps", eps, low=0)
    _check_tensors(
        x,
        {"weight_1": weight_1, "weight_2": weight_2, "weight_3": weight_3},
        {"bias_1": bias_1, "bias_2": bias_2, "bias_3": bias_3},
        {
            "norm_weight": norm_weight,
            "norm_bias": norm_bias,
            "norm_2_weight": norm_2_weight,
            "norm_2_bias": norm_2_bias,
        },
    )
    f = weight_1.shape[0]
    u = ACTIVATIONS[activation](F.linear(x, weight_1, bias_1))  # [..., F]
    v = F.linear(x, weight_2, bias_2)
    if norm_weight is not None:
        if norm_2_weight is None:
            norm_2_weight, norm_2_bias = norm_weight, norm_bias
        u = F.layer_norm(u, (f,), norm_weight, norm_bias, eps)
        v = F.layer_norm(v, (f,), norm_2_weight, norm_2_bias, eps)
    return F.linear(u * v, weight_3, bias_3)


def _check_tensors(
    x: Tensor, weights: dict[str, Tensor], biases: dict[str, Tensor | None], norms: dict[str, Tensor | None]
) -> None:
    first = weights["weight_1"]
    given = {"x": x, **weights, **{k: t for k, t in (biases | norms).items() if t is not None}}
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise ValueError(f"{name} is a {type(t).__name__}; it must be a tensor.")
        check_layout(name, t)
        if t.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {t.dtype}; it must be float64, float32, bfloat16 or float16.")
        if t.device != x.device:
            raise ValueError(f"x is on {x.device} and {name} on {t.device}; move them to one device.")
    if len({t.dtype for t in given.values()}) > 1 and not torch.is_autocast_enabled(x.device.type):
        kinds = ", ".join(f"{name} {t.dtype}" for name, t in given.items())
        raise ValueError(f"The dtypes differ ({kinds}); they must agree outside autocast.")
    f, c = first.shape if first.dim() == 2 else (0, x.shape[-1])
    wanted = {
        "weight_1": (f, c),
        "weight_2": (f, c),
        "weight_3": (c, f),
        "bias_1": (f,),
        "bias_2": (f,),
        "bias_3": (c,),
    }
    wanted |= dict.fromkeys(norms, (f,))
    if x.dim() == 0 or x.shape[-1] != c:
        raise ValueError(f"x has {x.shape[-1] if x.dim() else 'no'} channels, and weight_1 takes {c}; they must agree.")
    wrong = [f"{k} {list(given[k].shape)}" for k, shape in wanted.items() if k in given and given[k].shape != shape]
    if wrong:
        raise ValueError(
            f"weight_1 is {list(first.shape)} and {', '.join(wrong)}; they must be [F, C] (weight_1, weight_2), [C, F] "
            "(weight_3), [F] (bias_1, bias_2, norms) and [C] (bias_3)."
        )
    for needed, others in (
        ("norm_weight", ("norm_bias", "norm_2_weight", "norm_2_bias")),
        ("norm_2_weight", ("norm_2_bias",)),
    ):
        lonely = [k for k in others if norms[k] is not None and norms[needed] is None]
        if lonely:
            raise ValueError(f"{' and '.join(lonely)} given without {needed}; give {needed} too or leave all out.")
