"""The report of one conversion: a page that needs no network and has no script."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from formix.benchmarks import interleaved_medians
from formix.benchmarks.memory import peak_growth
from formix.models.image import image_size
from formix.records import write_atomically

LENGTHS = (32, 128, 512)  # tokens, as far as the model has positions
IMAGES = (224, 518)  # sides, where the model reads any


def measure_speed(source: Any, model: Any) -> list[dict[str, Any]]:
    """Milliseconds and peak memory of a forward pass of the source's own class and of the converted model, in turn."""
    rows = []
    for label, theirs, ours in _inputs(source, model):
        calls = {"before": _call(source, theirs), "after": _call(model, ours)}
        times = interleaved_medians(calls, repeats=5, seconds=3.0)
        memory = {name: peak_growth(call) for name, call in calls.items()}
        rows.append(
            {"input": label}
            | {f"{name}_ms": 1e3 * seconds for name, seconds in times.items()}
            | {f"{name}_bytes": size for name, size in memory.items()}
        )
    return rows


def write_report(record: dict[str, Any], path: str | os.PathLike[str], *, search: dict[str, Any] | None = None) -> None:
    """The page of a record (`Conversion.to_dict`): match error by layer, metrics by step, speed by length; and of the
    `search` (`Search.to_dict`) that chose the layers, its curve."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("formix.conversion"), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    errors: dict[str, list[float]] = record["match_errors"]
    highest = max((value for values in errors.values() for value in values), default=1.0) or 1.0
    names = list(next(iter(record["metrics"].values()), {}))
    template = environment.get_template("report.html.j2")
    page = template.render(record=record, errors=errors, highest=highest, names=names, search=search)
    write_atomically(path, page)


def _inputs(source: Any, model: Any) -> list[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    if hasattr(model, "config"):
        from formix.models.text import as_choices, positions

        lengths = sorted({min(n, positions(model.config) or n) for n in LENGTHS})
        ids = {n: {"input_ids": torch.ones(1, n, dtype=torch.long)} for n in lengths}
        batches = [(f"{n} tokens", as_choices(model, batch)) for n, batch in ids.items()]
        return [(label, batch, batch) for label, batch in batches]
    own: Any = image_size(model)
    stock = hasattr(source, "config")
    if getattr(model, "dynamic_img_size", False):
        sizes = [tuple(side // patch * patch for patch in model.patch_embed.patch_size) for side in IMAGES]
    else:
        sizes = [own]
    images = [torch.zeros(1, model.in_chans, *size) for size in sizes]
    return [
        (f"an image of {x.shape[-2]} x {x.shape[-1]}", {"pixel_values": x} if stock else {"x": x}, {"x": x})
        for x in images
    ]


def _call(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    dtype = next(model.parameters()).dtype
    typed = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    @torch.inference_mode()
    def call() -> None:
        model(**typed)

    return call
