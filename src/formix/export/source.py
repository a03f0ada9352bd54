"""What is exported: the model of a directory, and what lies beside it for its inputs and labels."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formix.models.companions import companions as companions_of
from formix.models.designed import Designed
from formix.models.image import ImageModel, image_size
from formix.models.inputs import image_inputs, label_names
from formix.training.job import trained_model

_log = logging.getLogger("formix")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model and what a server needs beside it."""

    model: Any
    task: str
    companions: tuple[Path, ...] = ()  # the tokenizer's files, and the like
    image: dict[str, Any] | None = None  # timm's data config
    size: tuple[int, int, int] | None = None  # channels, height, width of images
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def read_source(source: Any, *, img_size: int | None = None) -> Source:
    """A directory that formix can load, that of a training run too, or a model.

    Raises:
        ValueError: no model of formix's, or images of a size that the model does not take or that nothing says.
    """
    from formix.models import load
    from formix.models.text import task_of

    model = source
    companions: tuple[Path, ...] = ()
    if isinstance(source, str | Path):
        directory, _ = trained_model(Path(source))
        model = load(directory)
        companions = tuple(directory / name for name in companions_of(directory))
    elif (
        not isinstance(model, Designed | ImageModel) and getattr(getattr(model, "config", None), "design", None) is None
    ):
        raise ValueError(f"source is a {type(model).__name__}; give a directory or a model of formix's.")
    task = task_of(model)
    if task != "image-classification":
        if img_size is not None:
            raise ValueError(f"img_size is {img_size}, but this {type(model).__name__} reads text; leave it out.")
        labels = label_names(model) if task.endswith("classification") else None
        return Source(model=model, task=task, companions=companions, labels=labels)
    image, notes = _image(model)
    size = _size(model, image, img_size)
    if image is not None:
        image = {**image, "input_size": size}
    return Source(
        model=model, task="image", companions=companions, image=image, size=size, labels=label_names(model), notes=notes
    )


def _image(model: Any) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """timm's data config of the model: resize, crop, normalise."""
    from timm.data import resolve_data_config

    if hasattr(model, "pretrained_cfg"):
        return dict(resolve_data_config(pretrained_cfg=image_inputs(model))), ()
    if fields := image_inputs(model):
        return fields, ()
    note = "nothing beside the model says how its images are resized and normalised: ask who trained it"
    _log.warning("%s: %s.", type(model).__name__, note)
    return None, (note,)


def _size(model: Any, image: dict[str, Any] | None, asked: int | None) -> tuple[int, int, int]:
    """Channels, height and width: the model's own, or the one asked for where it takes any."""
    own = None if getattr(model, "dynamic_img_size", False) else image_size(model)
    channels = getattr(model, "in_chans", None) or model.config.num_channels
    if own is not None:
        if asked is not None and own != (asked, asked):
            raise ValueError(f"img_size is {asked}; this {type(model).__name__} takes {own[0]} x {own[1]} alone.")
        return channels, *own
    if asked is not None:
        return channels, asked, asked
    if image is None:
        raise ValueError(f"This {type(model).__name__} takes images of any size; give --img-size.")
    return channels, *image["input_size"][1:]
