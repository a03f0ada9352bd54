"""The parts of a layer by what they do, for every family of formix's models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from formix.design import LayerDesign, Layout

_SERIES = Layout()


@dataclass(frozen=True)
class Layer:
    """One layer of a model; parts that it does not have are None."""

    name: str  # in the model
    block: Any
    design: LayerDesign
    mixer: Any  # the attention, or the unit in its place: its output projection's output is the branch
    out: Any  # the projection behind the mixer, a linear layer [H D -> C]
    heads: int
    norms: tuple[Any, Any]
    ffn_in: tuple[Any, ...]  # the linear layers that read the FFN's input
    trunk: str  # "pre" or "post": where the family has its norms

    @property
    def branch(self) -> Any:
        """The module whose output is the mixer's branch, before layer scale, residual and norm."""
        return self.mixer if self.out is None else self.out


def layers(model: nn.Module) -> list[Layer]:
    """The layers of a model of formix's, or of timm's XCiT, in order.

    Raises:
        ValueError: not a model whose layers have designs.
    """
    found = [layer for name, module in model.named_modules() if (layer := _layer(name, module)) is not None]
    if not found:
        raise ValueError(f"A {type(model).__name__} has no layers of formix's; convert it first.")
    return found


def _layer(name: str, block: Any) -> Layer | None:
    kind = type(block).__name__
    if kind == "Block" and hasattr(block, "layer_design"):
        attn, mlp = block.attn, block.mlp
        out = getattr(attn, "proj", None)
        fc1 = getattr(mlp, "fc1", None)
        return Layer(
            name, block, block.layer_design, attn, out, getattr(attn, "num_heads", 0),
            (block.norm1, block.norm2), () if fc1 is None else (fc1,), "pre",
        )  # fmt: skip
    if kind == "XCABlock":
        attn = block.attn
        own: Any = getattr(attn, "mixer", None)  # None: timm's, cross-covariance
        design = LayerDesign(mixer=own, layout=_SERIES, index=int(name.rsplit(".", 1)[1]))
        return Layer(
            name, block, design, attn, attn.proj, attn.num_heads,
            (block.norm1, block.norm2), (block.mlp.fc1,), "pre",
        )  # fmt: skip
    if kind == "FormixBertLayer":
        attention = block.attention
        self_attention: Any = getattr(attention, "self", None)
        unit = attention.unit
        ffn = block.output is not None
        return Layer(
            name, block, block.layer_design, unit if unit is not None else self_attention,
            None if unit is not None else attention.output.dense, getattr(self_attention, "num_heads", 0),
            (attention.output.LayerNorm, block.output.LayerNorm if ffn else None),
            (block.intermediate.dense,) if ffn else (), "post",
        )  # fmt: skip
    if kind == "FormixGPT2Block":
        attn, gated = block.attn, not hasattr(block.attn, "c_proj")
        return Layer(
            name, block, block.layer_design, attn, None if gated else attn.c_proj, getattr(attn, "num_heads", 0),
            (block.ln_1, block.ln_2), () if block.mlp is None else (block.mlp.c_fc,), "pre",
        )  # fmt: skip
    if kind == "FormixLlamaDecoderLayer":
        attn, mlp = block.self_attn, block.mlp
        return Layer(
            name, block, block.layer_design, attn, getattr(attn, "o_proj", None), getattr(attn, "num_heads", 0),
            (block.input_layernorm, block.post_attention_layernorm),
            () if mlp is None else (mlp.gate_proj, mlp.up_proj), "pre",
        )  # fmt: skip
    return None


def weight_in_out(linear: Any) -> Tensor:
    """The weight of a linear layer as [in, out], a view."""
    return linear.weight.data if isinstance(linear, Conv1D) else linear.weight.data.T
