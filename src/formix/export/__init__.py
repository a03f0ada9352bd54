"""Models for other runtimes: torch.export, ONNX, OpenVINO. `formix export` is this package's command."""

from formix.export.core import export_model
from formix.export.formats import FORMATS
from formix.export.sheet import Axis, Check, Port, Sheet

__all__ = ["FORMATS", "Axis", "Check", "Port", "Sheet", "export_model"]
