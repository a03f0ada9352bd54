"""OpenVINO's IR (.xml and .bin), converted from torch.export's program, and its CPU plugin."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from formix.export.program import Program
from formix.export.sheet import Port

PACKAGES = ("openvino",)


def write(
    exported: torch.export.ExportedProgram,
    path: Path,
    program: Program,
    outputs: Sequence[Port],
    properties: Mapping[str, str],
    *,
    opset: int | None,
) -> int | None:
    """Write both files with the weights in the type that they have; the properties are its rt_info.

    Raises:
        ValueError: an operator that OpenVINO does not know.
    """
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    with _quiet():
        try:  # what openvino.convert_model does, but for its report of usage over the network
            frontend = FrontEndManager().load_by_framework("pytorch")
            decoder = TorchFXPythonDecoder.from_exported_program(exported)  # which has to outlive the conversion
            model = frontend.convert(frontend.load(decoder))
        except Exception as error:  # OpenVINO's errors have no common class
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"OpenVINO cannot convert this {type(program.model).__name__}: {reason}") from error
    if (given := len(model.inputs)) != len(program.inputs):
        raise ValueError(f"OpenVINO's model has {given} inputs, and the program {len(program.inputs)}.")
    for place, port in zip((*model.inputs, *model.outputs), (*program.inputs, *outputs), strict=True):
        place.get_tensor().set_names({port.name})
    for name, value in properties.items():
        model.set_rt_info(value, name.split("."))
    openvino.save_model(model, path, compress_to_fp16=False)
    return None


def run(path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> Callable[..., tuple[Tensor, ...]]:
    """The file as a function, in the precision of its weights: left alone, OpenVINO computes in bfloat16 on
    processors that have it.

    Raises:
        ValueError: the CPU plugin cannot run it.
    """
    import openvino

    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"OpenVINO cannot run this model on the CPU: {reason}") from error

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = {port.name: x.numpy() for port, x in zip(inputs, tensors, strict=True)}
        try:
            result = compiled(given)
        except RuntimeError as error:
            shapes = {name: list(x.shape) for name, x in given.items()}
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"OpenVINO fails on inputs of {shapes}: {reason}") from error
        return tuple(torch.from_numpy(result[port.name].copy()) for port in outputs)

    return call


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the decoder logs of PyTorch's operators that it does not know and no model here has."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def runtime() -> str:
    """Its name and version."""
    import openvino

    return f"openvino {openvino.__version__}"
