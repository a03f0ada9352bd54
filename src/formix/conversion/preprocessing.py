"""How images are prepared for a source, in the fields of timm's pretrained_cfg, which what is made of it keeps."""

from __future__ import annotations

from typing import Any

from formix.models.image import image_size
from formix.models.processor import of_processor

FIELDS = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size")


def keep_preprocessing(target: Any, source: Any) -> None:
    """Let an image model take its images as `source` does, in the size that it is built for unless it reads any."""
    if not hasattr(target, "pretrained_cfg"):
        return
    prepared = dict(source.pretrained_cfg) if hasattr(source, "pretrained_cfg") else of_processor(source.name_or_path)
    if not getattr(target, "dynamic_img_size", False):
        prepared["input_size"] = (target.in_chans, *image_size(target))  # type: ignore[misc]
    target.pretrained_cfg = {**target.pretrained_cfg, **{k: prepared[k] for k in FIELDS if k in prepared}}
