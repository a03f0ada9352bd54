"""How images are prepared for a model, and what its classes are called: in the fields of timm's pretrained_cfg."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from PIL import Image

from formix.models.image import NAMES, PROBLEM, image_size

_log = logging.getLogger("formix")
FIELDS = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size")
INDEPENDENT = "multi_label_classification"  # transformers' word for a sigmoid of each class


def image_inputs(model: Any) -> dict[str, Any]:
    """The fields for a model, formix's or its source; of one of transformers' those of the image processor beside it,
    none if there is none."""
    if not hasattr(model, "pretrained_cfg"):
        return _of_processor(getattr(model, "name_or_path", ""))
    cfg = dict(model.pretrained_cfg)
    found = {k: cfg[k] for k in FIELDS if cfg.get(k) is not None}
    channels = getattr(model, "in_chans", found.get("input_size", (3,))[0])  # timm's cfg has the name's own
    for statistic in {"mean", "std"} & found.keys():
        if len(values := found[statistic]) != channels:  # those of a name's three colours: their average
            found[statistic] = (sum(values) / len(values),) * channels
    return found


def label_names(model: Any) -> tuple[str, ...] | None:
    """The names of the classes in the order of the output, None where nobody gave them any."""
    if hasattr(model, "pretrained_cfg"):
        names = dict(model.pretrained_cfg).get(NAMES)
        found = None if names is None else tuple(names)
        return found if found and len(found) == model.num_classes else None
    named = getattr(model.config, "id2label", None) or {}
    if all(name == f"LABEL_{number}" for number, name in named.items()):  # transformers' own, for want of any
        return None
    return tuple(named[number] for number in sorted(named))


def knows_statistics(model: Any) -> bool:
    """Whether the statistics in a model's config are those that its weights were trained with: of a model that formix
    trained or converted. Any other has timm's, whatever its training did."""
    return getattr(model, "conversion_record", None) is not None or label_names(model) is not None


def independent_classes(model: Any) -> bool:
    """Whether each class is a question of its own (a sigmoid, in place of softmax over classes)."""
    if hasattr(model, "pretrained_cfg"):
        return dict(model.pretrained_cfg).get(PROBLEM) == INDEPENDENT
    return getattr(model.config, PROBLEM, None) == INDEPENDENT


def keep_inputs(target: Any, source: Any) -> None:
    """Let an image model take its images as `source` does, in the size that it is built for unless it reads any, and
    name its classes so where they are the same."""
    if not hasattr(target, "pretrained_cfg"):
        return
    prepared = image_inputs(source)
    if not getattr(target, "dynamic_img_size", False):
        prepared["input_size"] = (target.in_chans, *image_size(target))  # type: ignore[misc]
    if (names := label_names(source)) is not None and len(names) == target.num_classes:
        prepared[NAMES] = list(names)
    if independent_classes(source):
        prepared[PROBLEM] = INDEPENDENT
    target.pretrained_cfg = {**target.pretrained_cfg, **prepared}


def _of_processor(name: str) -> dict[str, Any]:
    """The fields for the image processor beside a model of transformers'; none for one that came from nowhere."""
    from transformers import AutoImageProcessor

    if not name:
        return {}
    try:
        processor = AutoImageProcessor.from_pretrained(name, local_files_only=os.path.isdir(name))
    except (OSError, ValueError) as error:
        _warn_of(name, str(error).strip().splitlines()[0])
        return {}
    given = {k: v for k, v in processor.to_dict().items() if v is not None}
    size = given["size"]
    crop = given["crop_size"] if given.get("do_center_crop") else size
    height, width = (crop.get(side, crop.get("shortest_edge")) for side in ("height", "width"))
    cropped = height / size.get("shortest_edge", size.get("height"))
    squashed = "height" in size
    if "crop_pct" in given:  # of ConvNeXt's, which CvT takes: larger ones are not cropped
        squashed = height >= 384
        cropped = 1.0 if squashed else given["crop_pct"]
    scale = 255 * given["rescale_factor"] if given.get("do_rescale") else 255  # timm divides pixels by 255
    normalised = bool(given.get("do_normalize"))
    mean, std = (given["image_mean"], given["image_std"]) if normalised else ([0.0] * 3, [1.0] * 3)
    return {
        "mean": tuple(x / scale for x in mean),
        "std": tuple(x / scale for x in std),
        "interpolation": Image.Resampling(given["resample"]).name.lower(),
        "crop_pct": cropped,
        "crop_mode": "squash" if squashed else "center",
        "input_size": (len(mean), height, width),
    }


@functools.cache  # a search converts one source many times
def _warn_of(name: str, reason: str) -> None:
    _log.warning(
        "%s: no image processor can be read (%s); the model's pretrained_cfg has timm's mean and std.",
        name,
        reason,
    )
