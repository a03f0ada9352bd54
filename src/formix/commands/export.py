"""`formix export`: a model for other runtimes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from formix.commands.arguments import parse_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A saved model as a file for PyTorch, ONNX Runtime or OpenVINO, run and compared with the model."""

    model: str  # a directory that formix.save, formix train or formix convert wrote
    out: str  # a file (.pt2, .onnx, .xml) or a directory
    format: Literal["torch", "onnx", "openvino"] | None = None  # None: by the name of the file
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; None: as they are saved
    batch: int | None = None  # a fixed batch; None: any
    tokens: int | None = None  # a fixed length of texts; None: any
    img_size: int | None = None  # side of images, for models that take any
    opset: int | None = None  # of ONNX, 18 to 25; None: 20
    # largest difference to the model in PyTorch, as a share of the largest output;
    # None: 1e-4 for float32, 2e-2 for float16, 1e-1 for bfloat16
    tolerance: float | None = None
    cache: bool = False  # of a language model that writes: keys and values of earlier tokens come in and go out
    kernels: bool = False  # torch: call formix's CPU kernels; loading then needs `import formix`


def export(arguments: list[str]) -> int:
    """Write a model for PyTorch without formix, ONNX Runtime or OpenVINO: formix export DIR --out=FILE."""
    config = parse_model(ExportConfig, "export", arguments)

    from formix.export import export_model

    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "model"}
    sheet = export_model(config.model, **settings)
    assert sheet.check is not None
    for kind, ports in (("input", sheet.inputs), ("output", sheet.outputs)):
        for port in ports:
            print(f"{kind:7} {port.name}  {port.dtype} [{', '.join(map(str, port.shape))}]")
    for note in sheet.notes:
        print(f"note    {note}")
    check = sheet.check
    print(
        f"check   {check.runtime}: largest difference {check.difference:.3g} in {len(check.cases)} calls, "
        f"{check.relative:.3g} of the largest output (tolerance {check.tolerance:g})"
    )
    if check.to_source != check.difference:
        print(f"        to the model as saved: {check.to_source:.3g}")
    print(f"wrote   {', '.join(f'{name} ({size:,} bytes)' for name, size in sheet.files.items())}, and its .json")
    return 0
