"""What the image models beside the plain ViT share: their description on disk and official checkpoints."""

from __future__ import annotations

import argparse
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from formix.design import Design

_log = logging.getLogger("formix")
# these say how a model is trained or placed, or where its weights came from, not what it is: a saved config.json leaves
# them out
RUNTIME_ARGUMENTS = (
    "device", "dtype", "weight_init", "drop_rate", "drop_path_rate", "pos_drop_rate", "proj_drop_rate",
    "attn_drop_rate", "patch_drop_rate", "head_bias", "head_zero_init", "pretrained_cfg", "pretrained_cfg_overlay",
    "cache_dir",
)  # fmt: skip
# what a config says of the classes, in timm's and transformers' words; pretrained_cfg has them too
OF_CLASSES = NAMES, PROBLEM = "label_names", "problem_type"
# the least of what a model has a number of, in timm's and transformers' words
_LEAST = {
    "num_classes": 0, "num_labels": 0, "in_chans": 1, "num_channels": 1,
    "depth": 1, "embed_dim": 1, "num_heads": 1, "hidden_dim": 1,
}  # fmt: skip


class ImageModel:
    """A model that its entry point in timm's registry builds again from `architecture` and `arguments`."""

    architecture: str
    arguments: dict[str, Any]
    design: Design | None

    def remember(self, architecture: str, arguments: Mapping[str, Any], design: Design | None) -> None:
        """Keep how the model was asked for."""
        self.architecture, self.design = architecture, design
        self.arguments = {k: v for k, v in arguments.items() if k not in RUNTIME_ARGUMENTS and k != "design"}

    def img_size(self: Any) -> tuple[int, int]:
        """Height and width of the images it is built for."""
        return tuple(self.patch_embed.img_size)

    def saved_config(self: Any) -> dict[str, Any]:
        """What config.json says, in timm's own format."""
        height, width = self.img_size()
        arguments = {
            **self.arguments,
            "num_classes": self.num_classes,
            "global_pool": self.global_pool,
            "in_chans": self.in_chans,
            "img_size": [height, width],
        }
        if self.design is not None:
            arguments["design"] = self.design.to_dict()
        kept = ("interpolation", "crop_pct", "crop_mode", "mean", "std", "first_conv", "classifier")
        cfg = {k: v for k, v in dict(self.pretrained_cfg).items() if k in kept}
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            **about_classes(dict(self.pretrained_cfg)),
            "num_features": self.num_features,
            "global_pool": self.global_pool,
            "model_args": arguments,
            "pretrained_cfg": {**cfg, "input_size": [self.in_chans, height, width]},
        }

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights under this model's names; families with several layouts override it."""
        return state


def about_classes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The names of the classes, where they have any, and whether each is a question of its own."""
    return {k: config[k] for k in OF_CLASSES if config.get(k) is not None}


def check_sizes(arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a number of layers, channels, heads or classes that no model has."""
    for name, least in _LEAST.items():
        given = arguments.get(name, least)
        if not isinstance(given, int) or isinstance(given, bool) or given < least:
            raise ValueError(f"{name} is {given!r}; it must be a whole number, {least} or more.")


def image_size(model: Any) -> tuple[int, int] | None:
    """Height and width of the images that a model takes; None: any."""
    size = getattr(model, "img_size", None)  # a method here, a part of the patch embedding in timm
    size = size() if callable(size) else getattr(getattr(model, "patch_embed", None), "img_size", None)
    return None if size is None else tuple(size)


def load_official(model: nn.Module, source: str | Path | Mapping[str, Any], *, ema: bool = False) -> None:
    """Load a checkpoint of the official code into `model`, every weight in its place (strict=True).

    Args:
        model: a published model (``sima_small_12_p16``, ``activator_32_p4``, ...).
        source: a file (.pth, .pt or .safetensors) or what it holds: the weights themselves, or a container with the
            weights under "model". Files are read with `weights_only=True`; nothing in them is executed.
        ema: take the container's "model_ema" instead.

    Raises:
        ValueError: no weights in `source`, or weights that do not fit the model.
    """
    state = _weights(source, ema)
    adapted = model.adapt_checkpoint(dict(state)) if isinstance(model, ImageModel) else dict(state)
    try:
        model.load_state_dict(adapted, strict=True)
    except RuntimeError as error:
        raise ValueError(f"These weights do not fit this model: {error}") from None


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the containers keep their arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, OSError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # an empty file has an error without words
        raise ValueError(
            f"{path} is damaged, or holds objects beside weights, which are not built ({reason}). "
            "If you trust its source, read it with torch.load(path, weights_only=False) and pass what it holds."
        ) from None


def _weights(source: str | Path | Mapping[str, Any], ema: bool) -> dict[str, Tensor]:
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"{path} is no file; give a checkpoint of the official code.")
        source = _read(path)
    key = "model_ema" if ema else "model"
    if isinstance(source, Mapping) and isinstance(source.get(key), Mapping):
        source = source[key]
    elif ema:
        raise ValueError("This checkpoint has no 'model_ema'; load it with ema=False.")
    if (
        not isinstance(source, Mapping)
        or not source
        or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in source.items())
    ):
        raise ValueError("This is no checkpoint: neither a mapping of names to tensors nor one under 'model'.")
    return {name.removeprefix("module."): tensor for name, tensor in source.items()}
