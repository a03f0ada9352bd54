"""big_vision's ViT weights: its npz parameter tree into formix's and timm's ViTs, and back.

The tree joins names by '/'; kernels are [in, out], attention's [C, H, D] and [H, D, C], the patch convolution HWIO.
Read are also trees of the older names (LayerNorm_2, MlpBlock_3, MultiHeadDotProductAttention_1, posembed_input), of
scanned models (all blocks in one array, depth first) and below a prefix such as `params/`. Query and key norms and the
gate have the names that flax gives them; ReLU attention adds no weights of its own. The attention of a probe that pools
the tokens (MAPHead_0, in some older files without a name of its own) is timm's `attn_pool`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

Array = np.ndarray
Tree = dict[str, Array]


class Layout(NamedTuple):
    """Conversion of one array; the number is that of heads."""

    to_torch: Callable[[Array, int], Array]
    to_tree: Callable[[Array, int], Array]


LAYOUTS = {
    "same": Layout(lambda a, h: a, lambda a, h: a),
    "dense": Layout(lambda a, h: a.T, lambda a, h: a.T),
    "conv": Layout(lambda a, h: a.transpose(3, 2, 0, 1), lambda a, h: a.transpose(2, 3, 1, 0)),
    "to heads": Layout(lambda a, h: a.reshape(len(a), -1).T, lambda a, h: a.T.reshape(a.shape[1], h, -1)),
    "head bias": Layout(lambda a, h: a.reshape(-1), lambda a, h: a.reshape(h, -1)),
    "from heads": Layout(
        lambda a, h: a.reshape(-1, a.shape[-1]).T, lambda a, h: a.T.reshape(h, a.shape[1] // h, a.shape[0])
    ),
}


class Weight(NamedTuple):
    """A place in the tree, the same in a ViT, the conversion, and which of how many parts of a packed weight it is."""

    tree: str
    torch: str
    layout: str
    part: int = 0
    parts: int = 1


def _pair(tree: str, name: str, kernel: str = "dense", bias: str = "same") -> list[Weight]:
    return [Weight(f"{tree}/kernel", f"{name}.weight", kernel), Weight(f"{tree}/bias", f"{name}.bias", bias)]


def _norm(tree: str, name: str) -> list[Weight]:
    return [Weight(f"{tree}/scale", f"{name}.weight", "same"), Weight(f"{tree}/bias", f"{name}.bias", "same")]


_ATTENTION = "MultiHeadDotProductAttention_0"
BLOCK = [
    *_norm("LayerNorm_0", "norm1"),
    *(
        weight._replace(part=i, parts=3)
        for i, part in enumerate(("query", "key", "value"))
        for weight in _pair(f"{_ATTENTION}/{part}", "attn.qkv", "to heads", "head bias")
    ),
    Weight(f"{_ATTENTION}/query_ln/scale", "attn.q_norm.weight", "same"),
    Weight(f"{_ATTENTION}/key_ln/scale", "attn.k_norm.weight", "same"),
    *_pair(f"{_ATTENTION}/gate", "attn.gate", "to heads", "head bias"),
    *_pair(f"{_ATTENTION}/out", "attn.proj", "from heads"),
    *_norm("LayerNorm_1", "norm2"),
    *_pair("MlpBlock_0/Dense_0", "mlp.fc1"),
    *_pair("MlpBlock_0/Dense_1", "mlp.fc2"),
]
POOL = [
    Weight("MAPHead_0/probe", "attn_pool.latent", "same"),
    *_pair(f"MAPHead_0/{_ATTENTION}/query", "attn_pool.q", "to heads", "head bias"),
    *(
        weight._replace(part=i, parts=2)
        for i, part in enumerate(("key", "value"))
        for weight in _pair(f"MAPHead_0/{_ATTENTION}/{part}", "attn_pool.kv", "to heads", "head bias")
    ),
    *_pair(f"MAPHead_0/{_ATTENTION}/out", "attn_pool.proj", "from heads"),
    *_norm("MAPHead_0/LayerNorm_0", "attn_pool.norm"),
    *_pair("MAPHead_0/MlpBlock_0/Dense_0", "attn_pool.mlp.fc1"),
    *_pair("MAPHead_0/MlpBlock_0/Dense_1", "attn_pool.mlp.fc2"),
]
OUTSIDE = [
    *_pair("embedding", "patch_embed.proj", "conv"),
    *_norm("Transformer/encoder_norm", "norm"),
    *_pair("pre_logits", "pre_logits"),
    *_pair("head", "head"),
]
OLDER = {  # older part of a name -> today's
    "Transformer/posembed_input/pos_embedding": "pos_embedding",
    "/LayerNorm_2/": "/LayerNorm_1/",
    "/MlpBlock_3/": "/MlpBlock_0/",
    "/MultiHeadDotProductAttention_1/": "/MultiHeadDotProductAttention_0/",
}
OLDER_POOL = ("probe", "LayerNorm_0", "MlpBlock_0", _ATTENTION)  # stood outside of all modules
PREFIXES = ("params/", "opt/target/", "target/")  # of whole training states; the rest of these is left out
_SCANNED = "Transformer/encoderblock/"


def load_npz(model: nn.Module, source: str | Path | Mapping[str, Array]) -> None:
    """Load a tree, or the npz file that holds one, into a ViT of formix's or timm's; every weight must have a place.

    Raises:
        ValueError: weights without a place, places without weights, or shapes that differ.
    """
    state = from_tree(read_npz(source) if isinstance(source, str | Path) else source, model)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"This tree does not fit this model: {error}") from None


def read_npz(path: str | Path) -> Tree:
    """The tree in an npz file.

    Raises:
        ValueError: no npz file, or a damaged one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no npz file of big_vision's weights: {error}") from None


def save_npz(model: nn.Module, path: str | Path, *, scan: bool = False) -> None:
    """Write the model's weights as big_vision's npz file; `scan` stacks the blocks, as its scanned models have them."""
    with open(path, "wb") as file:
        np.savez(file, **to_tree(model, scan=scan))  # type: ignore[arg-type]


def from_tree(tree: Mapping[str, Array], model: Any) -> dict[str, Tensor]:
    """The tree's weights under the model's names.

    A class token's position: big_vision has none, older trees add one to it. Both are the same function, so the
    position is added to the token or put in front as zero, as the model has it.

    Raises:
        ValueError: no ViT, weights without a place, or of other shapes: a tree says how many heads it is for.
    """
    if not hasattr(model, "blocks") or not hasattr(model, "patch_embed"):
        raise ValueError(f"A {type(model).__name__} is no Vision Transformer, which big_vision's trees are for.")
    remaining = _today(tree)
    state: dict[str, Tensor] = {}
    if "pos_embedding" in remaining:
        state |= _positions(remaining, model)
    own = model.state_dict()
    packed: dict[str, list[Tensor | None]] = {}
    for weight, heads in _weights(model):
        if weight.tree not in remaining or weight.torch not in own:
            continue
        array, place = remaining.pop(weight.tree), own[weight.torch].detach().float().cpu()
        wanted = LAYOUTS[weight.layout].to_tree(place.chunk(weight.parts)[weight.part].numpy(), heads).shape
        if array.shape != wanted:
            raise ValueError(
                f"{weight.tree} has shape {array.shape}, and this model's is {wanted}: make the model with the tree's "
                "width, heads, FFN and classes."
            )
        packed.setdefault(weight.torch, [None] * weight.parts)[weight.part] = _tensor(
            LAYOUTS[weight.layout].to_torch(array, heads)
        )
    for name, parts in packed.items():
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            state[name] = torch.cat(known) if len(parts) > 1 else known[0]
    if remaining:
        raise ValueError(
            f"The tree has {len(remaining)} weights without a place in this model ({', '.join(sorted(remaining)[:4])}, "
            "...): its depth, pooling, head, class token or design is another."
        )
    return state


def to_tree(model: Any, *, scan: bool = False) -> Tree:
    """The model's weights as big_vision's tree, in float32, and in float64 where the model is.

    Raises:
        ValueError: weights that the tree has no place for.
    """
    state = {
        name: tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in model.state_dict().items()
    }
    tree: Tree = {}
    token, positions = state.pop("cls_token", None), state.pop("pos_embed", None)
    if token is not None and positions is not None and not model.no_embed_class:
        token, positions = token + positions[:, :1], positions[:, 1:]
    for name, tensor in (("cls", token), ("pos_embedding", positions)):
        if tensor is not None:
            tree[name] = tensor.numpy()
    placed = set()
    for weight, heads in _weights(model):
        if weight.torch in state:
            placed.add(weight.torch)
            part = state[weight.torch].chunk(weight.parts)[weight.part]
            array = LAYOUTS[weight.layout].to_tree(part.numpy(), heads)
            tree[weight.tree] = np.ascontiguousarray(array)
    if set(state) - placed:
        raise ValueError(
            f"big_vision's tree has no place for {', '.join(sorted(set(state) - placed)[:4])}: only ViTs of softmax or "
            "pointwise attention in its own block can be exported."
        )
    return _scanned(tree, len(model.blocks)) if scan else tree


def _weights(model: Any) -> list[tuple[Weight, int]]:
    """Every place of the map in this model, with the number of heads there."""
    listed = [(weight, 1) for weight in OUTSIDE]
    if isinstance(getattr(model, "attn_pool", None), AttentionPoolLatent):
        listed += [(weight, model.attn_pool.num_heads) for weight in POOL]
    for i, block in enumerate(model.blocks):
        heads = getattr(block.attn, "num_heads", 1)
        for weight in BLOCK:
            place = weight._replace(
                tree=f"Transformer/encoderblock_{i}/{weight.tree}", torch=f"blocks.{i}.{weight.torch}"
            )
            listed.append((place, heads))
    return listed


def _today(tree: Mapping[str, Array]) -> Tree:
    """The tree with today's names, without a prefix and with one entry per block."""
    renamed: Tree = {}
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in tree)), "")
    for name, array in tree.items():
        if not name.startswith(prefix):
            continue
        array = np.asarray(array)
        name = name.removeprefix(prefix)
        for old, new in OLDER.items():
            name = name.replace(old, new)
        if name.split("/")[0] in OLDER_POOL:
            name = f"MAPHead_0/{name}"
        if name.startswith(_SCANNED):
            for i, layer in enumerate(array):
                renamed[f"Transformer/encoderblock_{i}/{name.removeprefix(_SCANNED)}"] = layer
        else:
            renamed[name] = array
    return renamed


def _scanned(tree: Tree, depth: int) -> Tree:
    first = "Transformer/encoderblock_0/"
    stacked = {name: a for name, a in tree.items() if not name.startswith("Transformer/encoderblock_")}
    for name in [n for n in tree if n.startswith(first)]:
        rest = name.removeprefix(first)
        stacked[_SCANNED + rest] = np.stack([tree[f"Transformer/encoderblock_{i}/{rest}"] for i in range(depth)])
    return stacked


def _positions(remaining: Tree, model: Any) -> dict[str, Tensor]:
    if getattr(model, "num_reg_tokens", 0):
        raise ValueError("This model has register tokens; big_vision's trees have none.")
    for name in ("pos_embedding", "cls"):
        if name in remaining and remaining[name].ndim != 3:
            raise ValueError(f"{name} has shape {remaining[name].shape}; it must be [1, tokens, width].")
    positions, number = _tensor(remaining.pop("pos_embedding")), model.patch_embed.num_patches
    token = _tensor(remaining.pop("cls")) if "cls" in remaining and model.cls_token is not None else None
    if positions.shape[1] == number + 1 and token is not None:
        token, positions = token + positions[:, :1], positions[:, 1:]
    if positions.shape[1] != number:
        raise ValueError(
            f"The tree has {positions.shape[1]} positions, the model {number} patches: load it at the image size it "
            "was trained at, then call set_input_size."
        )
    if token is None:
        return {"pos_embed": positions}
    if not model.no_embed_class:
        positions = torch.cat([torch.zeros_like(token), positions], dim=1)
    return {"cls_token": token, "pos_embed": positions}


def _tensor(array: Array) -> Tensor:
    if array.dtype.kind not in "fiuV":
        raise ValueError(f"The tree has an array of type {array.dtype}; weights are numbers.")
    if array.dtype == np.dtype("V2"):  # bfloat16, which numpy files cannot name
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(np.array(array))
