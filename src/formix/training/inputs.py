"""What a trained model keeps of its data: how its inputs are prepared and what its outputs are called, so that its
directory alone is enough to use it, with formix, timm or transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from formix.data import Data
from formix.data.byte_tokenizer import byte_tokenizer
from formix.models import save
from formix.models.inputs import NAMES


def describe_data(model: Any, data: Data) -> None:
    """Write down in the model's config the statistics of its images and the names of its classes."""
    if data.task == "image-classification" and hasattr(model, "pretrained_cfg"):
        prepared = {**_normalisation(data), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
        model.pretrained_cfg = {**model.pretrained_cfg, **prepared, NAMES: list(data.class_names or ())}
    elif data.class_names is not None:
        model.config.id2label = dict(enumerate(data.class_names))
        model.config.label2id = {name: number for number, name in enumerate(data.class_names)}


def save_with_inputs(model: nn.Module, directory: str | Path, data: Data) -> None:
    """`formix.save`, and beside the weights of a model of transformers' its tokenizer or image processor.

    Models that read bytes get a tokenizer too (`byte_tokenizer`). Every tokenizer cuts at the length of the training's
    sequences.
    """
    save(model, directory)
    if data.task == "image-classification":
        if not hasattr(model, "pretrained_cfg"):
            _image_processor(data).save_pretrained(directory)
        return
    tokenizer = data.tokenizer or byte_tokenizer(masked=data.task == "masked-lm")
    longest, tokenizer.model_max_length = tokenizer.model_max_length, data.sequence_length
    tokenizer.save_pretrained(directory)
    tokenizer.model_max_length = longest


def _normalisation(data: Data) -> dict[str, list[float]]:
    """Mean and deviation of each channel, of pixels 0 to 1."""
    of_bytes = data.provenance["normalisation"]
    return {name: [value / 255 for value in of_bytes[name]] for name in ("mean", "std")}


def _image_processor(data: Data) -> Any:
    """transformers' own for the shorter side scaled and the centre cut out, as folders of pictures are read."""
    from transformers import CLIPImageProcessor

    assert data.img_size is not None
    height, width = data.img_size
    statistics = _normalisation(data)
    return CLIPImageProcessor(
        size={"shortest_edge": min(height, width)},
        crop_size={"height": height, "width": width},
        resample=2,  # bilinear
        image_mean=statistics["mean"],
        image_std=statistics["std"],
        do_convert_rgb=data.in_chans == 3,
    )
