"""ONNX, by torch.onnx's exporter from torch.export's program, and ONNX Runtime on the CPU."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from formix.export.program import Program, dynamic_shapes
from formix.export.sheet import Port

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSETS = range(18, 26)  # from the first that torch.onnx writes to the last that onnxscript converts to
OPSET = 20


def check_opset(opset: int) -> None:
    """Raise `ValueError` for an opset that is not written."""
    if opset not in OPSETS:
        raise ValueError(f"opset is {opset}; it must be {OPSETS[0]} to {OPSETS[-1]}.")


def write(
    exported: torch.export.ExportedProgram,
    path: Path,
    program: Program,
    outputs: Sequence[Port],
    properties: Mapping[str, str],
    *,
    opset: int | None,
) -> int | None:
    """Write the file, and above 1.5 GB its weights to another beside it; the properties are its metadata_props.

    Returns:
        The opset.

    Raises:
        ValueError: an operator that torch.onnx does not know, or another opset than the one asked for.
    """
    from onnx_ir.traversal import RecursiveGraphIterator

    opset = OPSET if opset is None else opset
    with _quiet():
        try:
            written = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                input_names=[port.name for port in program.inputs],
                output_names=[port.name for port in outputs],
                dynamic_shapes=dynamic_shapes(program),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise ValueError(f"torch.onnx cannot write this {type(program.model).__name__}: {reason}") from error
        assert written is not None
        got = written.model.opset_imports.get("")
        if got != opset or (own := sorted(set(written.model.opset_imports) - {""})):
            found = f"opset {got}" if got != opset else f"operators of {', '.join(own)}"
            raise ValueError(f"opset is {opset}, and the exporter gave {found}; choose another --opset.")
        for part in (written.model.graph, *RecursiveGraphIterator(written.model.graph)):
            part.metadata_props.clear()  # of the exporter's own, larger than a small model
        written.model.metadata_props.update(properties)
        written.save(path)
    return opset


def run(path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> Callable[..., tuple[Tensor, ...]]:
    """The file as a function.

    Raises:
        ValueError: ONNX Runtime cannot run it on the CPU.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    failures = (
        states.Fail,
        states.InvalidArgument,
        states.InvalidGraph,
        states.NotImplemented,
        states.RuntimeException,
    )
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except failures as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"ONNX Runtime cannot run this model on the CPU: {reason}") from error
    names = [port.name for port in outputs]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = {port.name: x.numpy() for port, x in zip(inputs, tensors, strict=True)}
        try:
            return tuple(torch.from_numpy(out) for out in session.run(names, given))
        except failures as error:
            shapes = {name: list(x.shape) for name, x in given.items()}
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"ONNX Runtime fails on inputs of {shapes}: {reason}") from error

    return call


def runtime() -> str:
    """Its name and version."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints of its progress and warns of its own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
