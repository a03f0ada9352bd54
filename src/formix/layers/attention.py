"""Multi-head attention with any mixer that has queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from formix.design import GatedUnit, Mixer, Sima, Softmax
from formix.layers.attend import attend
from formix.ops import select_heads
from formix.ops.masks import autocast_inputs

GATES: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda g: g, "silu": F.silu, "sigmoid": F.sigmoid}
KeyValue = tuple[Tensor, Tensor]  # keys and values, each [B, H, N, D]
for _operator in ("attend", "select_heads"):
    torch.fx.wrap(_operator)  # a node of FX graphs: what it does depends on the inputs


@register_notrace_module  # a leaf of timm's FX extractor
class Attention(nn.Module):
    """y = proj(g * mixer(Q, K, V)), Q, K, V = split(qkv(x)), with an optional gate g = act(gate(x)).

    Parameters are named and shaped as in timm's `Attention` (`qkv`, `q_norm`, `k_norm`, `norm`, `gate`, `proj`), so
    its weights load. Input and output are [B, N, C].

    Args:
        dim: C, width of the input.
        num_heads: H; a `Sima` mixer with its own number of heads overrides it.
        mixer: the operator between the two projections.
        attn_head_dim, dim_out: as in timm; None: dim / H and dim.
        qkv_bias, proj_bias, scale_norm, attn_drop, proj_drop, norm_layer: as in timm.
        qk_norm: normalise queries and keys by `norm_layer`, as the trunk has it; the mixer's own `qk_norm` is a
            scale-only LayerNorm of eps 1e-6 and goes first.
        skip_heads: the heads that read `source_kv` (skip-layer attention).

    Raises:
        ValueError: dim is not a multiple of num_heads, or the mixer has no keys.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        mixer: Mixer | None = None,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        skip_heads: Sequence[int] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        mixer = Softmax() if mixer is None else mixer
        if isinstance(mixer, GatedUnit):
            raise ValueError("A gated unit has no queries and keys; use formix.layers.GatedUnit.")
        if isinstance(mixer, Sima) and mixer.num_heads is not None:
            num_heads = mixer.num_heads
        if num_heads < 1 or (attn_head_dim is None and dim % num_heads):
            raise ValueError(f"num_heads is {num_heads}; it must divide dim, which is {dim}.")
        self.mixer = mixer
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.skip_heads = tuple(skip_heads)
        norm_layer = norm_layer or nn.LayerNorm

        def qk_layer() -> nn.Module:
            if getattr(mixer, "qk_norm", False):
                return nn.LayerNorm(self.head_dim, eps=1e-6, bias=False, **dd)
            return norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()

        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **dd)
        self.q_norm, self.k_norm = qk_layer(), qk_layer()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **dd) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **dd) if getattr(mixer, "gate", None) else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(
        self,
        x: Tensor,
        qkv: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        source_kv: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """What goes into `proj`, [B, N, H D], from the packed projection `qkv` [B, N, 3 H D] of `x`; and the
        layer's own keys and values for the layers that read them."""
        b, n, _ = qkv.shape
        # unbound where the gradients are stacked again: in the order of qkv, so that they are copied once and not twice
        q, k, v = qkv.view(b, n, 3, self.num_heads, self.head_dim).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # each [B, H, N, D]
        q, k = self.q_norm(q), self.k_norm(k)
        own = (k, v)
        if source_kv is not None and self.skip_heads:  # in one type: autocast computes norms of keys in float32
            q, k, v, *source = autocast_inputs(q, k, v, *source_kv)
            k, v = (select_heads(a, s, self.skip_heads) for a, s in zip((k, v), source, strict=True))
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = attend(self.mixer, q, k, v, attn_mask=attn_mask, is_causal=is_causal, dropout_p=dropout_p)
        out = self.norm(out.transpose(1, 2).reshape(b, n, self.attn_dim))  # [B, N, H D]
        if self.gate is not None:
            out = out * GATES[self.mixer.gate](self.gate(x))  # type: ignore[union-attr, index]
        return out, own

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        source_kv: KeyValue | None = None,
        return_kv: bool = False,
    ) -> Tensor | tuple[Tensor, KeyValue]:
        out, own = self.mix(x, self.qkv(x), attn_mask, is_causal, source_kv)
        out = self.proj_drop(self.proj(out))  # [B, N, C]
        return (out, own) if return_kv else out

    def extra_repr(self) -> str:
        return f"mixer={self.mixer!r}" + (f", skip_heads={self.skip_heads}" if self.skip_heads else "")
