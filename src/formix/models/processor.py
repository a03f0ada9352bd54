"""transformers' image processors in the fields of timm's pretrained_cfg."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from PIL import Image

_log = logging.getLogger("formix")


def of_processor(name: str) -> dict[str, Any]:
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
    scale = 255 * given["rescale_factor"] if given.get("do_rescale") else 255  # timm divides pixels by 255
    normalised = bool(given.get("do_normalize"))
    mean, std = (given["image_mean"], given["image_std"]) if normalised else ([0.0] * 3, [1.0] * 3)
    return {
        "mean": tuple(x / scale for x in mean),
        "std": tuple(x / scale for x in std),
        "interpolation": Image.Resampling(given["resample"]).name.lower(),
        "crop_pct": height / size.get("shortest_edge", size.get("height")),
        "crop_mode": "squash" if "height" in size else "center",
        "input_size": (len(mean), height, width),
    }


@functools.cache  # a search converts one source many times
def _warn_of(name: str, reason: str) -> None:
    _log.warning(
        "%s: no image processor can be read (%s); a converted model's pretrained_cfg has timm's mean and std.",
        name,
        reason,
    )
