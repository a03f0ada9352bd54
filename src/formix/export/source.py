"""What is exported: the model of a directory, and what lies beside it for its inputs and labels."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from formix.models.companions import COMPANIONS
from formix.models.designed import Designed
from formix.models.image import ImageModel, image_size
from formix.models.processor import of_processor

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
    notes: tuple[str, ...] = field(default=())


def read_source(source: Any, *, img_size: int | None = None) -> Source:
    """A directory that formix can load, that of a training run too, or a model.

    Raises:
        ValueError: no model of formix's, or images of a size that the model does not take or that nothing says.
    """
    from formix.models import load

    model = source
    companions: tuple[Path, ...] = ()
    if isinstance(source, str | Path):
        directory, places = _places(Path(source))
        model = load(directory)
        found = {name: place / name for place in reversed(places) for name in COMPANIONS if (place / name).is_file()}
        companions = tuple(found.values())
    elif (
        not isinstance(model, Designed | ImageModel) and getattr(getattr(model, "config", None), "design", None) is None
    ):
        raise ValueError(f"source is a {type(model).__name__}; give a directory or a model of formix's.")
    task = _task(model)
    if task is not None:
        if img_size is not None:
            raise ValueError(f"img_size is {img_size}, but this {type(model).__name__} reads text; leave it out.")
        return Source(model=model, task=task, companions=companions, labels=_labels(model))
    image, notes = _image(model, [p.parent for p in companions if p.name == "preprocessor_config.json"])
    size = _size(model, image, img_size)
    if image is not None:
        image = {**image, "input_size": size}
    return Source(
        model=model, task="image", companions=companions, image=image, size=size, labels=_labels(model), notes=notes
    )


def _places(directory: Path) -> tuple[Path, list[Path]]:
    """The model's directory, and those with what belongs to it: a run's tokenizer is where its config says."""
    run = directory if (directory / "checkpoints").is_dir() else directory.parent
    if not ((run / "checkpoints").is_dir() and (run / "config.json").is_file()):
        return directory, [directory]
    model = run / "model"
    if directory == run and not model.is_dir():
        raise ValueError(f"{run} has no model yet; finish its training, or give a checkpoint's model directory.")
    tokenizer = json.loads((run / "config.json").read_text()).get("tokenizer")
    if tokenizer is not None and not Path(tokenizer).is_dir():
        _log.warning("%s, the tokenizer of the run, is gone; its files are not beside the exported model.", tokenizer)
        tokenizer = None
    return model if directory == run else directory, [directory, *([Path(tokenizer)] if tokenizer else [])]


def _task(model: Any) -> str | None:
    """A text model's task in formix's words; None for images."""
    if not hasattr(model, "config") or model.config.model_type == "formix_cvt":
        return None
    from formix.models.text import FAMILIES

    return next(task for _, kinds in FAMILIES.values() for task, kind in kinds.items() if type(model) is kind)


def _image(model: Any, processors: list[Path]) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """timm's data config of the model: resize, crop, normalise."""
    from timm.data import resolve_data_config

    if hasattr(model, "pretrained_cfg"):
        return dict(resolve_data_config(pretrained_cfg=dict(model.pretrained_cfg))), ()
    if processors and (fields := of_processor(str(processors[0]))):
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
        if asked < 1:
            raise ValueError(f"img_size is {asked}; it must be 1 or more.")
        return channels, asked, asked
    if image is None:
        raise ValueError(f"This {type(model).__name__} takes images of any size; give --img-size.")
    return channels, *image["input_size"][1:]


def _labels(model: Any) -> tuple[str, ...] | None:
    """Names of the classes in the order of the logits; None where there are none but numbers."""
    if hasattr(model, "config"):
        names = dict(getattr(model.config, "id2label", None) or {})
        plain = all(name == f"LABEL_{i}" for i, name in names.items())
        return None if plain else tuple(names[i] for i in sorted(names))
    given = dict(getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return tuple(given) if given and len(given) == model.num_classes else None
