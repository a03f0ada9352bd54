"""The parallel block with one input projection and one output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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

    def __init__(self) -> None:
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

    @staticmethod
    def active(block: Block) -> bool:
        """Whether one product computes the same function as two: no active dropout or stochastic depth, and the parts
        still plain (an adapter or a hook on one of them must not be bypassed)."""
        if not FusedParallel.fits(block):
            return False
        attn, mlp = _parts(block)
        linears = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        bypassed = (*linears, attn, attn.proj_drop, mlp, mlp.drop1, mlp.drop2, block.ls1, block.ls2)
        if any(type(m) is not nn.Linear for m in linears) or any(_hooked(m) for m in bypassed):
            return False
        if any(is_traceable_wrapper_subclass(m.weight) for m in linears):
            return False  # quantised weights, as torchao's, multiply and cannot be joined
        # each part's own mode: for Monte Carlo dropout the dropouts of an evaluated model are put in training mode
        drops = (attn.proj_drop, mlp.drop1, mlp.drop2)
        paths = (block.drop_path1, block.drop_path2)
        return not any(d.training and d.p > 0 for d in drops) and not any(
            p.training and not isinstance(p, nn.Identity) for p in paths
        )

    def __call__(
        self, block: Block, h: Tensor, attn_mask: Tensor | None, is_causal: bool, source_kv: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        attn, mlp = _parts(block)
        in_weight, in_bias, out_weight, out_bias = self._joined(block)
        packed = F.linear(h, in_weight, in_bias)  # [B, N, 3 H D + F]
        qkv, hidden = packed.split([3 * attn.attn_dim, in_weight.shape[0] - 3 * attn.attn_dim], dim=-1)
        mixed, own = attn.mix(h, qkv, attn_mask, is_causal, source_kv)
        return F.linear(torch.cat([mixed, mlp.act(hidden)], dim=-1), out_weight, out_bias), own

    def _joined(self, block: Block) -> tuple[Tensor, ...]:
        attn, mlp = _parts(block)
        scales = (block.ls1, block.ls2)
        if torch.is_grad_enabled() or block.training or torch.compiler.is_compiling():
            # Training is ahead. Fused optimizers change weights without raising their version, so what was kept from
            # an evaluation before must not outlive this call.
            self._kept = None
            return _join(attn, mlp, *scales)
        parts = (attn.qkv, mlp.fc1, attn.proj, mlp.fc2, *scales)
        # by their names, for the replicas of DataParallel have tensors that are no parameters
        weights = [
            t for m in parts for name in ("weight", "bias", "gamma") if (t := getattr(m, name, None)) is not None
        ]
        if any(type(w) is not nn.Parameter or w.is_inference() for w in weights):
            return _join(attn, mlp, *scales)  # made under inference_mode, or stand-ins: no version to know them by
        key = tuple((w.data_ptr(), w._version, w.dtype) for w in weights)
        kept = self._kept  # which another thread may replace
        if kept is None or kept[0] != key:
            # the weights' memory is held as well: others at the same address could not be told apart
            self._kept = kept = (key, _join(attn, mlp, *scales), [w.detach() for w in weights])
        return kept[1]

    def forget(self) -> None:
        """Drop the joined weights."""
        self._kept = None

    def __deepcopy__(self, memo: dict) -> FusedParallel:
        return FusedParallel()

    def __getstate__(self) -> dict:
        return {"_kept": None}


def _parts(block: Block) -> tuple[Attention, Mlp]:
    assert isinstance(block.attn, Attention)
    assert isinstance(block.mlp, Mlp)
    return block.attn, block.mlp


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
