"""The parallel block with one input projection and one output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn

from formix.layers.attention import Attention, KeyValue

if TYPE_CHECKING:
    from formix.layers.block import Block


class FusedParallel:
    """A(h) + F(h) = [mixer(h W_qkv) | act(h W_1)] [W_o ; W_2] + b_o + b_2, with h [W_qkv ; W_1] in one product.

    The parameters stay those of the block; the joined ones are made of them when needed and, in evaluation mode without
    gradients, kept until a parameter's memory or version changes or the block is trained again. (Writing through
    `.data` in evaluation mode changes neither: call `.train()` and `.eval()` after it.) Equal to the separate form up
    to rounding (PAF's page: one GEMM each).
    """

    def __init__(self, block: Block) -> None:
        self.block = (block,)  # in a tuple, so that the block is not registered as a part of itself
        self._kept: tuple[tuple, tuple[Tensor, ...], list[Tensor]] | None = None

    @staticmethod
    def fits(block: Block) -> bool:
        """Whether the block's parts are those that the fused form computes."""
        return (
            block.layout.parallel
            and type(block.attn) is Attention
            and type(block.mlp) is Mlp
            and isinstance(block.mlp.norm, nn.Identity)
        )

    def active(self) -> bool:
        """Whether one product computes the same function as two: no active dropout or stochastic depth, and the parts
        still plain (an adapter or a hook on one of them must not be bypassed)."""
        if not self.fits(self.block[0]):
            return False
        attn, mlp = self._parts()
        linears = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        bypassed = (*linears, attn, attn.proj_drop, mlp, mlp.drop1, mlp.drop2, self.block[0].ls1, self.block[0].ls2)
        if any(type(m) is not nn.Linear for m in linears) or any(_hooked(m) for m in bypassed):
            return False
        # each part's own mode: for Monte Carlo dropout the dropouts of an evaluated model are put in training mode
        drops = (attn.proj_drop, mlp.drop1, mlp.drop2)
        paths = (self.block[0].drop_path1, self.block[0].drop_path2)
        return not any(d.training and d.p > 0 for d in drops) and not any(
            p.training and not isinstance(p, nn.Identity) for p in paths
        )

    def __call__(
        self, h: Tensor, attn_mask: Tensor | None, is_causal: bool, source_kv: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        attn, mlp = self._parts()
        in_weight, in_bias, out_weight, out_bias = self._joined()
        packed = F.linear(h, in_weight, in_bias)  # [B, N, 3 H D + F]
        qkv, hidden = packed.split([3 * attn.attn_dim, in_weight.shape[0] - 3 * attn.attn_dim], dim=-1)
        mixed, own = attn.mix(h, qkv, attn_mask, is_causal, source_kv)
        return F.linear(torch.cat([mixed, mlp.act(hidden)], dim=-1), out_weight, out_bias), own

    def _parts(self) -> tuple[Attention, Mlp]:
        block = self.block[0]
        assert isinstance(block.attn, Attention)
        assert isinstance(block.mlp, Mlp)
        return block.attn, block.mlp

    def _joined(self) -> tuple[Tensor, ...]:
        attn, mlp = self._parts()
        scales = (self.block[0].ls1, self.block[0].ls2)
        if torch.is_grad_enabled() or self.block[0].training or torch.compiler.is_compiling():
            # Training is ahead. Fused optimizers change weights without raising their version, so what was kept from
            # an evaluation before must not outlive this call.
            self._kept = None
            return _join(attn, mlp, *scales)
        parameters = [p for m in (attn.qkv, mlp.fc1, attn.proj, mlp.fc2, *scales) for p in m.parameters()]
        if any(type(p) is not nn.Parameter or p.is_inference() for p in parameters):
            return _join(attn, mlp, *scales)  # made under inference_mode, or stand-ins: no version to know them by
        key = tuple((p.data_ptr(), p._version, p.dtype) for p in parameters)
        if self._kept is None or self._kept[0] != key:
            # the parameters' memory is held as well: other weights at the same address could not be told apart
            self._kept = (key, _join(attn, mlp, *scales), [p.detach() for p in parameters])
        return self._kept[1]

    def forget(self) -> None:
        """Drop the joined weights."""
        self._kept = None

    def __deepcopy__(self, memo: dict) -> FusedParallel:
        return FusedParallel(memo.get(id(self.block[0]), self.block[0]))

    def __getstate__(self) -> dict:
        return {"block": self.block, "_kept": None}


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__  # accelerate's hooks take the place of the method


def _join(attn: Attention, mlp: Mlp, scale1: nn.Module, scale2: nn.Module) -> tuple[Tensor, ...]:
    def bias(linear: nn.Linear | nn.Conv2d) -> Tensor:
        return linear.weight.new_zeros(linear.weight.shape[0]) if linear.bias is None else linear.bias

    def scaled(linear: nn.Linear | nn.Conv2d, scale: nn.Module) -> tuple[Tensor, Tensor]:
        if isinstance(scale, LayerScale):
            return scale.gamma[:, None] * linear.weight, scale.gamma * bias(linear)
        return linear.weight, bias(linear)

    w_o, b_o = scaled(attn.proj, scale1)
    w_2, b_2 = scaled(mlp.fc2, scale2)
    return (
        torch.cat([attn.qkv.weight, mlp.fc1.weight]),  # [3 H D + F, C]
        torch.cat([bias(attn.qkv), bias(mlp.fc1)]),
        torch.cat([w_o, w_2], dim=1),  # [C, H D + F]
        b_o + b_2,
    )
