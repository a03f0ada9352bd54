"""What a server has to know of an exported model, as the JSON file beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = "formix-export-1"


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output: a tensor by name."""

    name: str
    dtype: str  # of the tensor, whatever the weights are in: "float32", "int64"
    shape: tuple[Any, ...]  # numbers are fixed; names are the sheet's axes, or sums and products of them
    about: str = ""  # what it is, or how it is used


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A size that may be another in every call."""

    least: int
    most: int | None = None  # null: no limit of the model's own


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the file and of the model in PyTorch, on inputs other than those traced with."""

    sizes: dict[str, int]  # of the axes
    padding: Literal["none", "left", "right"] = "none"
    difference: float  # largest absolute difference of all outputs


@dataclass(frozen=True, kw_only=True)
class Check:
    """The file as its runtime computes it, against the model as PyTorch computes it here in the same type."""

    runtime: str  # and its version
    cases: tuple[Case, ...]
    difference: float  # the largest of all cases
    largest: float  # the largest absolute value of the model's outputs
    relative: float  # difference / largest, which is held to the tolerance
    tolerance: float
    to_source: float  # largest absolute difference to the model in the type that it was saved in


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The whole description; `formix.records.read` and `write` read and write it."""

    schema: str = SCHEMA
    file: str  # the model, beside this file
    files: dict[str, int]  # all that belong to it, with their bytes
    format: str  # "torch", "onnx" or "openvino"
    opset: int | None = None  # of ONNX
    dtype: str  # of the weights and of what is computed with them
    kernels: bool = False  # torch: calls formix's own operators, so that `import formix` has to come first
    model: str  # formix's class
    task: str
    design: dict[str, Any] | None = None  # formix.Design.from_dict reads it; null for a model without (NiNformer)
    formula: str | None = None  # of the design
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    axes: dict[str, Axis]
    image: dict[str, Any] | None = None  # timm's data config: how pixels become the input
    # vocabulary, padding, and the tokenizer's files, which are beside this file; of a classifier transformers'
    # problem_type: softmax or sigmoid of the logits, or the value itself
    text: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None  # names of the classes in the order of the logits
    notes: tuple[str, ...] = ()  # what is particular to this model
    check: Check | None = None
    versions: dict[str, str] = field(default_factory=dict)
