"""The formats: each module writes a program to a file, and runs such a file.

PACKAGES                              what has to be installed; the format's name is formix's extra for it
write(exported, path, program, outputs, properties, opset=...) -> the opset, None where there is none
run(path, inputs, outputs)            -> the file as a function of tensors
runtime()                             -> what `run` runs it in
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

FORMATS = {"torch": ".pt2", "onnx": ".onnx", "openvino": ".xml"}


def find(name: str) -> ModuleType:
    """The module of a format.

    Raises:
        ValueError: an unknown format, or one whose packages are not installed.
    """
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}; it must be one of {', '.join(map(repr, FORMATS))}.")
    module = importlib.import_module(f"formix.export.formats.{name}_format")
    if missing := [package for package in module.PACKAGES if importlib.util.find_spec(package) is None]:
        raise ValueError(f"format {name!r} needs {' and '.join(missing)}; pip install formix[{name}].")
    return module
