"""formix: transformers whose blocks are not "softmax attention, then an FFN"."""

from formix import _hooks
from formix.conversion import convert
from formix.design import Design, design, list_designs
from formix.models import create_model, load, save

__version__ = "0.1.0"
__all__ = ["Design", "convert", "create_model", "design", "list_designs", "load", "save"]

_hooks.install()
