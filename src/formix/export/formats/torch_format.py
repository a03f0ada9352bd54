"""torch.export's file (.pt2): `torch.export.load(path).module()(*inputs)`, in Python, with PyTorch alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from formix.export.program import Program
from formix.export.sheet import Port

PACKAGES: tuple[str, ...] = ()


def write(
    exported: torch.export.ExportedProgram,
    path: Path,
    program: Program,
    outputs: Sequence[Port],
    properties: Mapping[str, str],
    *,
    opset: int | None,
) -> int | None:
    """Write the file; the properties are its extra files. Returns the opset, which it has none of."""
    torch.export.save(exported, path, extra_files=dict(properties))
    return None


def run(path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> Callable[..., tuple[Tensor, ...]]:
    """The file as a function."""
    module = torch.export.load(path).module()

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return module(*tensors)

    return call


def runtime() -> str:
    """Its name and version."""
    return f"torch {torch.__version__}"
