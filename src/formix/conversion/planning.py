"""What a conversion does to a model, before it does it."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from formix.benchmarks import count_flops
from formix.design import Design, LayerDesign
from formix.models.image import image_size

_log = logging.getLogger("formix")
TOKENS = 128  # of the sequence on which a text model's operations are counted


@dataclass(frozen=True, kw_only=True)
class NewWeight:
    """A parameter that the source has no weight for, and how it starts."""

    name: str
    shape: list[int]
    rule: str


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """What becomes of one layer."""

    layer: int
    mixer: str  # "softmax -> pointwise"
    layout: str  # "series -> parallel, post-norm"
    keys_of: int | None  # the layer whose keys and values some of its heads read
    keys_were_of: int | None = None  # and in the source


@dataclass(kw_only=True)
class Plan:
    """The changes of a conversion: layers, weights, parameters and operations."""

    family: str
    source: str
    design: dict[str, Any]
    formula: str
    layers: list[LayerChange]
    kept: list[str] = field(default_factory=list)  # formix's names
    folded: dict[str, str] = field(default_factory=dict)  # name -> what was folded into it
    new: list[NewWeight] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)  # name -> shape; kept aside, to convert back
    parameters: tuple[int, int] = (0, 0)  # before, after
    flops: tuple[int | None, int | None] = (None, None)  # of one forward pass on `input`
    input: str = ""

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def __str__(self) -> str:
        lines = [f"{self.source} -> {self.formula}", ""]
        lines += [
            f"  layer {c.layer}: {c.mixer}; {c.layout}"
            + ("" if c.keys_of is None else f"; some heads read keys and values of layer {c.keys_of}")
            + ("" if c.keys_were_of in (None, c.keys_of) else f"; none reads layer {c.keys_were_of}'s any more")
            for c in self.layers
        ]
        lines += ["", f"  kept     {len(self.kept)} tensors"]
        lines += [f"  folded   {name}: {what}" for name, what in self.folded.items()] or ["  folded   none"]
        lines += [f"  new      {w.name} {w.shape}: {w.rule}" for w in self.new] or ["  new      none"]
        lines += [f"  dropped  {name} {shape}, kept aside" for name, shape in self.dropped.items()] or [
            "  dropped  none"
        ]
        before, after = self.parameters
        lines += ["", f"  parameters  {before:,} -> {after:,}"]
        if self.flops[1] is not None:
            ops = "not counted" if self.flops[0] is None else f"{self.flops[0]:,}"
            lines += [f"  operations  {ops} -> {self.flops[1]:,} for {self.input}"]
        return "\n".join(lines)


def layer_changes(before: list[LayerDesign] | None, after: list[LayerDesign]) -> list[LayerChange]:
    """The layers whose design differs; `before` is None for a source whose mixer, cross-covariance, is none of
    formix's."""
    changes = []
    for i, layer in enumerate(after):
        old = ("cross-covariance", "series", None) if before is None else _words(before[i])
        new = _words(layer)
        if old == new:
            continue
        changes.append(
            LayerChange(
                layer=i,
                mixer=new[0] if old[0] == new[0] else f"{old[0]} -> {new[0]}",
                layout=new[1] if old[1] == new[1] else f"{old[1]} -> {new[1]}",
                keys_of=new[2],
                keys_were_of=old[2],
            )
        )
    return changes


def _words(layer: LayerDesign) -> tuple[str, str, int | None]:
    """Mixer with the options that are not its default ones, layout, and the layer whose keys are read."""
    mixer = layer.mixer
    options = {f.name: getattr(mixer, f.name) for f in dataclasses.fields(mixer) if getattr(mixer, f.name) != f.default}
    given = ", ".join(f"{name}={value}" for name, value in options.items())
    return mixer.kind + (f"({given})" if given else ""), layer.layout.words, layer.source


def layers_of_design(design: Design, depth: int) -> list[LayerDesign]:
    return [design.layer(i, depth) for i in range(depth)]


def shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def example_input(model: Any) -> tuple[Any, str]:
    """A batch of one on which the operations of a model of formix's are counted, and what it is."""
    if hasattr(model, "config"):
        from formix.models.text import as_choices, positions

        tokens = min(TOKENS, positions(model.config) or TOKENS)
        return as_choices(model, {"input_ids": torch.zeros(1, tokens, dtype=torch.long)}), f"{tokens} tokens"
    size: Any = image_size(model)
    image = torch.zeros(1, model.in_chans, *size, dtype=next(model.parameters()).dtype)
    return image, f"an image of {size[0]} x {size[1]}"


def operations(model: nn.Module, inputs: Any) -> int | None:
    """Floating-point operations of a forward pass; None for a model that the counter, which has shapes but no numbers,
    cannot run: some look at numbers (dynamic rotary scaling) or refuse a length (chunks of the FFN)."""
    try:
        return count_flops(model, inputs)
    except Exception as error:  # whatever a model raises: a side figure ends no conversion
        _log.warning("The operations of this %s are not counted: %s", type(model).__name__, error)
        return None
