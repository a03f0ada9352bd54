"""formix: transformers whose blocks are not "softmax attention, then an FFN"."""

import importlib
from typing import Any

from formix import _hooks, ops  # with ops the operators that exported programs call
from formix.design import Design, design, list_designs
from formix.models import create_model, load, save

__version__ = "0.1.0"
__all__ = ["Design", "convert", "create_model", "design", "list_designs", "load", "ops", "save"]

_hooks.install()


def __getattr__(name: str) -> Any:
    if name == "convert":  # it stands above what imports formix, so not before it is asked for
        return importlib.import_module("formix.conversion").convert
    if name in ("conversion", "export", "layers", "models"):
        return importlib.import_module(f"formix.{name}")
    raise AttributeError(f"module 'formix' has no attribute {name!r}")
