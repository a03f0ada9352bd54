"""Blocks in the language of `torch.jit.script`, on the parameters of the blocks that they are made of.

formix's blocks choose operators and order by Python objects, which TorchScript does not know. `torch.jit.script` asks a
model for a stand-in (`__prepare_scriptable__`, see `formix.models.script`), and these are its parts: the same functions
by the plain formulas, under the same parameter names, without kernels.
"""

from __future__ import annotations

from typing import List, Optional, Tuple  # noqa: UP035  (TorchScript reads annotations and knows these alone)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formix.design import Pointwise, Sima
from formix.layers.attention import Attention
from formix.layers.block import Block, BlockStack
from formix.layers.gated_unit import GatedUnit

_KEYS = -1  # L is the number of keys; 0: of those a row may see


class ScriptableAttention(nn.Module):
    """`Attention`: returns its output [B, N, C] and the layer's own keys and values."""

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        mixer = attn.mixer
        self.num_heads, self.head_dim, self.attn_dim, self.scale = (
            attn.num_heads, attn.head_dim, attn.attn_dim, attn.scale,
        )  # fmt: skip
        self.kind = mixer.kind
        self.activation, self.exponent, self.length, self.eps = "", 0.0, 0, 0.0
        if isinstance(mixer, Pointwise):
            self.activation = mixer.activation
            self.exponent = 0.0 if mixer.activation == "sigmoid_bias" else mixer.length_exponent
            self.length = {"visible": 0, "keys": _KEYS}[mixer.length] if isinstance(mixer.length, str) else mixer.length
        elif isinstance(mixer, Sima):
            self.eps = mixer.eps
        self.gate_kind: str = getattr(mixer, "gate", None) or ""
        # heads in their order out of own heads (0 to H - 1) and the source layer's (H to 2 H - 1)
        self.heads = [i + self.num_heads if i in attn.skip_heads else i for i in range(self.num_heads)]
        self.dropout = attn.attn_drop.p
        self.qkv, self.q_norm, self.k_norm, self.norm = attn.qkv, attn.q_norm, attn.k_norm, attn.norm
        self.gate = attn.gate if attn.gate is not None else nn.Identity()
        self.proj, self.proj_drop = attn.proj, attn.proj_drop

    def forward(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor] = None,  # noqa: UP045
        is_causal: bool = False,
        source_k: Optional[Tensor] = None,  # noqa: UP045
        source_v: Optional[Tensor] = None,  # noqa: UP045
    ) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)  # [B, H, N, D]
        own_k, own_v = k, v
        if source_k is not None and source_v is not None:
            k = torch.cat([k, source_k], dim=1)[:, self.heads]
            v = torch.cat([v, source_v], dim=1)[:, self.heads]
        out = self.mix(q, k, v, attn_mask, is_causal)
        return self.proj_drop(self.proj(self.gated(x, out))), own_k, own_v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], is_causal: bool) -> Tensor:  # noqa: UP045
        """The operator on [B, H, N, D]."""
        if self.kind == "sima":
            if mask is not None or is_causal:
                raise ValueError("A scripted SimA takes no mask and is not causal.")
            return l1(q, k, v, self.eps)
        if is_causal:
            causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            if mask is None:
                mask = causal
            elif mask.dtype == torch.bool:
                mask = mask & causal
            else:
                mask = mask.masked_fill(~causal, float("-inf"))
        dropout = self.dropout if self.training else 0.0
        if self.kind == "softmax":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
        return pointwise(q * self.scale, k, v, mask, self.activation, self.exponent, self.length, dropout)

    def gated(self, x: Tensor, out: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, N, H D], by the gate if there is one."""
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate_kind == "":
            return out
        g = self.gate(x)
        if self.gate_kind == "silu":
            g = F.silu(g)
        elif self.gate_kind == "sigmoid":
            g = torch.sigmoid(g)
        return out * g


class ScriptableMixer(ScriptableAttention):
    """`ScriptableAttention` for trunks that want the output alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out = self.mix(self.q_norm(q), self.k_norm(k), v, None, False)
        return self.proj_drop(self.proj(self.gated(x, out)))


class ScriptableUnit(nn.Module):
    """`GatedUnit`: it has no keys, so its output stands in their place, where nobody reads it."""

    def __init__(self, unit: GatedUnit) -> None:
        super().__init__()
        self.activation: str = unit.activation
        self.fc1, self.fc2, self.fc3, self.drop = unit.fc1, unit.fc2, unit.fc3, unit.drop
        self.norm = unit.norm if unit.norm is not None else nn.Identity()
        self.norm2 = unit.norm2 if unit.norm2 is not None else self.norm

    def forward(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor] = None,  # noqa: UP045
        is_causal: bool = False,
        source_k: Optional[Tensor] = None,  # noqa: UP045
        source_v: Optional[Tensor] = None,  # noqa: UP045
    ) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006
        u = self.fc1(x)
        if self.activation == "gelu":
            u = F.gelu(u)
        elif self.activation == "silu":
            u = F.silu(u)
        elif self.activation == "relu":
            u = F.relu(u)
        elif self.activation == "sigmoid":
            u = torch.sigmoid(u)
        y = self.drop(self.fc3(self.norm(u) * self.norm2(self.fc2(x))))
        return y, y, y


class ScriptableBlock(nn.Module):
    """`Block`, with the parts in the order of its layout."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.pre, self.parallel = block.norm_position == "pre", block.layout.parallel
        self.ffn = block.mlp is not None
        self.norm1 = block.norm1
        self.norm2 = block.norm2 if block.norm2 is not None else block.norm1  # tied
        self.attn = ScriptableUnit(block.attn) if isinstance(block.attn, GatedUnit) else ScriptableAttention(block.attn)
        self.ls1, self.drop_path1 = block.ls1, block.drop_path1
        none = nn.Identity()
        self.mlp = block.mlp if block.mlp is not None else none
        self.ls2, self.drop_path2 = (block.ls2, block.drop_path2) if self.ffn else (none, none)

    def forward(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor],  # noqa: UP045
        is_causal: bool,
        source_k: Optional[Tensor],  # noqa: UP045
        source_v: Optional[Tensor],  # noqa: UP045
    ) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006
        h = self.norm1(x) if self.pre else x
        mixed, k, v = self.attn(h, attn_mask, is_causal, source_k, source_v)
        y = x + self.drop_path1(self.ls1(mixed))
        if self.parallel:
            y = y + self.feed(h)
            return (y if self.pre else self.norm2(y)), k, v
        if not self.pre:
            y = self.norm1(y)
        if self.ffn:
            y = y + self.feed(self.norm2(y)) if self.pre else self.norm2(y + self.feed(y))
        return y, k, v

    def feed(self, h: Tensor) -> Tensor:
        """The FFN's branch."""
        return self.drop_path2(self.ls2(self.mlp(h)))


class ScriptableStack(nn.Sequential):
    """`BlockStack`: keys and values of source layers go to the layers that read them."""

    def __init__(self, blocks: BlockStack) -> None:
        listed: list[Block] = list(blocks)  # type: ignore[arg-type]
        super().__init__(*(ScriptableBlock(block) for block in listed))
        sources = [block.layer_design.source for block in listed]
        self.sources = [-1 if s is None else s for s in sources]
        self.read = [i in sources for i in range(len(listed))]

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
        keys: List[Tensor] = []  # noqa: UP006
        values: List[Tensor] = []  # noqa: UP006
        nothing = x.new_empty(0)
        for i, block in enumerate(self):
            source = self.sources[i]
            if source < 0:
                x, k, v = block(x, attn_mask, is_causal, None, None)
            else:
                x, k, v = block(x, attn_mask, is_causal, keys[source], values[source])
            keys.append(k if self.read[i] else nothing)
            values.append(v if self.read[i] else nothing)
        return x


def wide(x: Tensor) -> Tensor:
    """In float32 if it is in 16 bits."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def pointwise(
    q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], h: str, exponent: float, length: int, dropout: float  # noqa: UP045
) -> Tensor:  # fmt: skip
    """L^-a h(Q K^T) V, as `formix.ops.pointwise_attention`; the scale is in q already."""
    dtype = v.dtype
    q, k, v = wide(q), wide(k), wide(v)
    scores = q @ k.transpose(-2, -1)  # [B, H, Nq, Nk]
    number = torch.full([1], float(length if length > 0 else k.shape[2]), dtype=q.dtype, device=q.device)
    if mask is not None and length == 0:
        number = mask.expand(scores.shape).sum(-1, keepdim=True).clamp(min=1).to(q.dtype)
    if h == "relu":
        weights = F.relu(scores)
    elif h == "relu2":
        weights = F.relu(scores).square()
    elif h == "gelu":
        weights = F.gelu(scores, approximate="tanh")
    elif h == "gelu_erf":
        weights = F.gelu(scores)
    elif h == "softplus":
        weights = F.softplus(scores, threshold=40.0)
    elif h == "relu6":
        weights = F.relu6(scores)
    elif h == "sigmoid":
        weights = torch.sigmoid(scores)
    elif h == "sigmoid_bias":
        weights = torch.sigmoid(scores - number.log())
    else:
        weights = scores
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    weights = F.dropout(weights, dropout, dropout > 0.0)
    return ((weights @ v) * number ** (-exponent)).to(dtype)


def l1(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Q diag(c) (K^T V), as `formix.ops.l1_attention`."""
    dtype = v.dtype
    q, k, v = wide(q), wide(k), wide(v)
    c_q, c_k = (1 / a.abs().sum(-2, keepdim=True).clamp(min=eps) for a in (q, k))
    return (q @ (c_q.transpose(-2, -1) * (c_k.transpose(-2, -1) * (k.transpose(-2, -1) @ v)))).to(dtype)
