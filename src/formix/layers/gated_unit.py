"""Activator's gated unit as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from formix.design import GatedUnit as GatedUnitMixer
from formix.design import GluActivation, LayerDesign
from formix.ops.gated import ACTIVATIONS


class GatedUnit(nn.Module):
    """y = (N(act(x W1 + b1)) * N'(x W2 + b2)) W3 + b3 on [B, N, C]; N, N' only with `inner_norm`
    (`formix.ops.gated_unit`).

    It mixes no tokens: masks and the causal flag, which say what a token may see of others, change nothing.

    Args:
        dim: C.
        hidden_features: F, the inner width.
        activation: gelu (exact), silu, relu, sigmoid or identity.
        inner_norm: LayerNorm (eps 1e-5) of both branches before their product.
        tied: one inner norm for both branches, as the official code has it.
        proj_drop: dropout of the output; the official unit has none.

    Raises:
        ValueError: an unknown activation, or an inner width below 1.
    """

    def __init__(
        self,
        dim: int,
        hidden_features: int,
        *,
        activation: GluActivation = "gelu",
        inner_norm: bool = False,
        tied: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(map(repr, ACTIVATIONS))}.")
        if hidden_features < 1:
            raise ValueError(
                f"The gated unit's inner width is {hidden_features} with a model width of {dim}; choose a larger ratio."
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden_features, **dd)
        self.fc2 = nn.Linear(dim, hidden_features, **dd)
        self.norm = nn.LayerNorm(hidden_features, **dd) if inner_norm else None
        self.norm2 = nn.LayerNorm(hidden_features, **dd) if inner_norm and not tied else None
        self.fc3 = nn.Linear(hidden_features, dim, **dd)
        self.drop = nn.Dropout(proj_drop)

    @classmethod
    def of(cls, layer: LayerDesign, dim: int, *, proj_drop: float = 0.0, **dd: Any) -> GatedUnit:
        """The unit of a layer whose mixer is one; with `official` its inner norms are tied and it has no dropout."""
        mixer = layer.mixer
        assert isinstance(mixer, GatedUnitMixer)
        return cls(
            dim,
            int(dim * mixer.ratio),
            activation=mixer.activation,
            inner_norm=mixer.inner_norm or layer.official,
            tied=layer.official,
            proj_drop=0.0 if layer.official else proj_drop,
            **dd,
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        # the layers are called, so that an adapter or a hook on one of them is not bypassed
        u, v = ACTIVATIONS[self.activation](self.fc1(x)), self.fc2(x)  # [B, N, F]
        if self.norm is not None:
            u, v = self.norm(u), (self.norm if self.norm2 is None else self.norm2)(v)
        return self.drop(self.fc3(u * v))
