"""timm's `ParallelScalingBlock` (ViT-22B, arXiv 2302.05442) and formix's block with design `parallel`, both ways.

Both compute x + ls(A(h) + F(h)), h = norm(x). timm keeps one input projection [F | q | k | v] and one output
projection or two; formix keeps the parameters of timm's plain block and joins them when it runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from formix.design import Design, Softmax
from formix.design import design as find_design
from formix.layers import Attention, Block

# timm's parameters of one block -> ours, and how one becomes the other; read in both directions
SAME, SPLIT_ROWS, SPLIT_COLUMNS, SUM, COPIES = "same", "split rows", "split columns", "sum", "copies"
PARAMETERS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("in_norm.weight", ("norm1.weight",), SAME),
    ("in_norm.bias", ("norm1.bias",), SAME),
    ("in_proj.weight", ("mlp.fc1.weight", "attn.qkv.weight"), SPLIT_ROWS),
    ("in_proj.bias", ("mlp.fc1.bias", "attn.qkv.bias"), SPLIT_ROWS),
    ("mlp_bias", ("mlp.fc1.bias",), SAME),  # in place of in_proj.bias
    ("q_norm.weight", ("attn.q_norm.weight",), SAME),
    ("q_norm.bias", ("attn.q_norm.bias",), SAME),
    ("k_norm.weight", ("attn.k_norm.weight",), SAME),
    ("k_norm.bias", ("attn.k_norm.bias",), SAME),
    ("attn_out_proj.weight", ("attn.proj.weight",), SAME),
    ("attn_out_proj.bias", ("attn.proj.bias",), SAME),
    ("mlp_out_proj.weight", ("mlp.fc2.weight",), SAME),
    ("mlp_out_proj.bias", ("mlp.fc2.bias",), SAME),
    ("out_proj.weight", ("attn.proj.weight", "mlp.fc2.weight"), SPLIT_COLUMNS),  # in place of the two above
    ("out_proj.bias", ("attn.proj.bias", "mlp.fc2.bias"), SUM),
    ("ls.gamma", ("ls1.gamma", "ls2.gamma"), COPIES),
)


def import_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with timm's parallel blocks -> the same with formix's; all other keys pass unchanged.

    Works for one block and for a whole VisionTransformer. A joined output bias goes to the attention's projection,
    and the FFN's becomes zero.
    """
    result = dict(state)
    for prefix in _prefixes(state, "in_proj.weight"):
        width = state[f"{prefix}in_proj.weight"].shape[1]  # C
        for theirs, ours, operation in PARAMETERS:
            value = result.pop(prefix + theirs, None)
            if value is None:
                continue
            if operation == SPLIT_ROWS:
                parts = value.split([value.shape[0] - 3 * width, 3 * width])
            elif operation == SPLIT_COLUMNS:
                parts = value.split([width, value.shape[1] - width], dim=1)
            elif operation == SUM:
                parts = (value, torch.zeros_like(value))
            else:
                parts = (value,) * len(ours)
            result |= {prefix + name: part.clone() for name, part in zip(ours, parts, strict=True)}
    return result


def export_state(state: Mapping[str, Tensor], *, fuse_out_proj: bool = False) -> dict[str, Tensor]:
    """A state dict with formix's parallel blocks -> the same with timm's; all other keys pass unchanged.

    Args:
        fuse_out_proj: as the timm block has it: one output projection in place of two.

    Raises:
        ValueError: a block that timm's cannot hold: two different layer scales, a second norm or a gate.
    """
    result = dict(state)
    for prefix in _prefixes(state, "attn.qkv.weight"):
        block = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        known = {name for _, ours, _ in PARAMETERS for name in ours}
        unknown = sorted(set(block) - known)
        if unknown:
            raise ValueError(f"ParallelScalingBlock has no place for {', '.join(prefix + k for k in unknown)}.")
        joined_bias = "attn.qkv.bias" in block
        if joined_bias and "mlp.fc1.bias" not in block:
            block["mlp.fc1.bias"] = block["mlp.fc1.weight"].new_zeros(block["mlp.fc1.weight"].shape[0])
        elif "mlp.fc1.bias" not in block:
            raise ValueError("The FFN's first layer has no bias, which ParallelScalingBlock always has.")
        left_out = {"mlp_bias" if joined_bias else "in_proj.bias"}
        left_out |= {f"{p}.{w}" for p in (("attn_out_proj", "mlp_out_proj") if fuse_out_proj else ("out_proj",))
                     for w in ("weight", "bias")}  # fmt: skip
        for name in block:
            result.pop(prefix + name, None)
        for theirs, ours, operation in PARAMETERS:
            parts = [block[name] for name in ours if name in block]
            if theirs in left_out or len(parts) != len(ours):
                continue
            result[prefix + theirs] = _joined(parts, operation)
    return result


def _joined(parts: list[Tensor], operation: str) -> Tensor:
    if operation == SPLIT_ROWS:
        return torch.cat(parts)
    if operation == SPLIT_COLUMNS:
        return torch.cat(parts, dim=1)
    if operation == SUM:
        return parts[0] + parts[1]
    if operation == COPIES and not torch.equal(*parts):
        raise ValueError(
            "ls1 and ls2 differ, and ParallelScalingBlock scales both branches by one vector: multiply them into the "
            "output projections first."
        )
    return parts[0].clone()


def _prefixes(state: Mapping[str, Tensor], mark: str) -> list[str]:
    return [key.removesuffix(mark) for key in state if key == mark or key.endswith(f".{mark}")]


def from_parallel_scaling(block: ParallelScalingBlock, design: str | Design = "parallel") -> Block:
    """timm's parallel block as formix's, with copied weights; the same function in evaluation mode.

    In training the dropout inside the FFN stays the only one, and stochastic depth, which timm applies to the sum,
    is of each branch on its own.

    Args:
        design: a pre-norm parallel design; with another mixer than softmax the weights are carried over.

    Raises:
        ValueError: a design of another layout.
    """
    chosen = find_design(design)
    if not chosen.layout.parallel or chosen.layout.norm == "post":
        raise ValueError(f"The design {chosen.describe()!r} is not parallel behind one norm; add 'parallel' to it.")
    norms: Any = block.in_norm
    dim = int(block.in_proj.in_features)
    bias = block.in_proj.bias is not None
    out_bias = (block.out_proj or block.attn_out_proj).bias is not None  # type: ignore[union-attr]
    state = import_state(block.state_dict())
    hidden = int(state["mlp.fc1.weight"].shape[0])

    def norm_layer(size: int, **dd: Any) -> nn.Module:
        return type(norms)(size, eps=norms.eps, **dd)

    def mlp_layer(**timm: Any) -> nn.Module:  # timm's first layer has a bias whatever the others have
        return Mlp(**{**timm, "hidden_features": hidden, "bias": (True, out_bias)})

    act: Callable[[], nn.Module] = lambda: copy.deepcopy(block.mlp_act)  # noqa: E731
    new = Block(
        dim,
        block.num_heads,
        mlp_ratio=hidden / dim,
        qkv_bias=bias,
        qk_norm=not isinstance(block.q_norm, nn.Identity),
        proj_bias=out_bias,
        attn_drop=block.attn_drop.p,
        proj_drop=block.mlp_drop.p,
        init_values=1.0 if isinstance(block.ls, LayerScale) else None,
        drop_path=block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0,
        act_layer=act,
        norm_layer=norm_layer,
        mlp_layer=mlp_layer,
        design=chosen,
        device=block.in_proj.weight.device,
        dtype=block.in_proj.weight.dtype,
    )
    new.attn.proj_drop.p = new.mlp.drop2.p = 0.0  # type: ignore[union-attr]
    new.load_state_dict(state, strict=chosen.mixer == Softmax())
    return new.train(block.training)


def to_parallel_scaling(block: Block, *, fuse_out_proj: bool = False) -> ParallelScalingBlock:
    """formix's block as timm's parallel block, with copied weights; the same function in evaluation mode.

    Raises:
        ValueError: a block whose function timm's cannot compute: another mixer or layout, skip wiring, a gate.
    """
    attn, mlp = block.attn, block.mlp
    plain = block.layout.parallel and block.norm_position == "pre" and isinstance(attn, Attention)
    if not plain or attn.mixer != Softmax() or attn.skip_heads or type(mlp) is not Mlp:
        raise ValueError(
            "timm's ParallelScalingBlock is softmax attention and an FFN behind one norm; this block is "
            f"{block.layer_design.mixer.kind} with {block.layout}."
        )
    assert isinstance(attn, Attention)
    assert isinstance(mlp, Mlp)
    norms: Any = block.norm1
    act: Callable[[], nn.Module] = lambda: copy.deepcopy(mlp.act)  # noqa: E731
    new = ParallelScalingBlock(
        attn.qkv.in_features,
        attn.num_heads,
        mlp_ratio=(mlp.fc1.weight.shape[0] + 0.5) / attn.qkv.in_features,  # timm takes the whole part of the product
        qkv_bias=attn.qkv.bias is not None,
        qk_norm=not isinstance(attn.q_norm, nn.Identity),
        proj_bias=attn.proj.bias is not None,
        proj_drop=mlp.drop1.p,
        attn_drop=attn.attn_drop.p,
        init_values=1.0 if isinstance(block.ls1, LayerScale) else None,
        drop_path=block.drop_path1.drop_prob or 0.0 if isinstance(block.drop_path1, DropPath) else 0.0,
        act_layer=act,  # type: ignore[arg-type]
        norm_layer=lambda size, **dd: type(norms)(size, eps=norms.eps, **dd),  # type: ignore[arg-type]
        fuse_out_proj=fuse_out_proj,
        device=attn.qkv.weight.device,
        dtype=attn.qkv.weight.dtype,
    )
    new.load_state_dict(export_state(block.state_dict(), fuse_out_proj=fuse_out_proj), strict=True)
    return new.train(block.training)
