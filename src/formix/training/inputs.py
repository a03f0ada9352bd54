"""What a trained model keeps of its data: how its inputs are prepared and what its outputs are called, so that its
directory alone is enough to use it, with formix, timm or transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from formix.data import Data
from formix.data.byte_tokenizer import byte_tokenizer
from formix.models import save
from formix.models.image import NAMES, PROBLEM
from formix.models.inputs import INDEPENDENT
from formix.training.config import Loss

SENTENCE_INPUTS = ["input_ids", "token_type_ids", "attention_mask"]


def describe_data(model: Any, data: Data, loss: Loss = "softmax") -> None:
    """Write down in the model's config the statistics of its images, the names of its classes, and whether its loss
    makes each of them a question of its own."""
    problem = INDEPENDENT if loss == "sigmoid" else None
    if data.task == "image-classification" and hasattr(model, "pretrained_cfg"):
        prepared = {**_normalisation(data), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
        named = {NAMES: list(data.class_names or ()), PROBLEM: problem}
        model.pretrained_cfg = {**model.pretrained_cfg, **prepared, **named}
    elif data.class_names is not None:
        model.config.problem_type = problem
        model.config.id2label = dict(enumerate(data.class_names))
        model.config.label2id = {name: number for number, name in enumerate(data.class_names)}


def save_with_inputs(model: nn.Module, directory: str | Path, data: Data) -> None:
    """`formix.save`, and beside the weights of a model of transformers' its tokenizer or image processor.

    Models that read bytes get a tokenizer too (`byte_tokenizer`). Every tokenizer cuts at the length of the training's
    sequences, and gives the token types that sentences had there.
    """
    save(model, directory)
    if data.task == "image-classification":
        if not hasattr(model, "pretrained_cfg"):
            _image_processor(data).save_pretrained(directory)
        return
    tokenizer = data.tokenizer or byte_tokenizer(masked=data.task == "masked-lm")
    tokenizer = copy.copy(tokenizer)
    tokenizer.model_max_length = data.sequence_length
    if data.task.startswith("sequence-"):
        tokenizer.model_input_names, tokenizer.padding_side = SENTENCE_INPUTS, "right"
        written = dict.fromkeys(("model_input_names", "padding_side"))  # with the tokenizer's values, as set above
        tokenizer.init_kwargs = {**tokenizer.init_kwargs, **written}
    tokenizer.save_pretrained(directory)


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
