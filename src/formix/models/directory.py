"""Models on disk: config.json with the design inside, model.safetensors beside it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from timm.models import adapt_input_conv
from torch import Tensor, nn

from formix.design import Design
from formix.models import text
from formix.models.designed import Designed
from formix.models.image import OF_CLASSES, ImageModel, about_classes, image_size
from formix.models.recorded import ASIDE, FILE, remember_record, write_record
from formix.records import replacing

_log = logging.getLogger("formix")
WEIGHTS = "model.safetensors"
OWN = ("model*.safetensors*", FILE, ASIDE)  # the files that belong to one model's weights
LAST = ("config.json", ASIDE, FILE)  # the files that make a directory a model's, and a conversion's


def save_directory(model: nn.Module, directory: Path) -> None:
    """See `formix.save`. Each file is written under another name first and renamed when it is complete."""
    image = isinstance(model, Designed | ImageModel)
    if not image and getattr(getattr(model, "config", None), "design", None) is None:
        raise ValueError(f"A {type(model).__name__} is no model of formix's; make it with formix.create_model.")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; a model is saved in a directory.")
    if not image:
        _save_pretrained(model, directory)
        return
    described = model.saved_config()  # type: ignore[operator]
    for name, argument in described["model_args"].items():
        try:
            json.dumps(argument)
        except TypeError:
            raise ValueError(
                f"This model was made with {name}={argument!r}, which no config.json can hold; give it by name."
            ) from None
    _check_described(model, described)
    # timm reads num_classes beside model_args; within, transformers' Auto classes would give it twice
    arguments = {k: v for k, v in described["model_args"].items() if k != "num_classes"}
    config = json.dumps({**described, "model_args": arguments}, indent=2)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / "config.json") as described_in, replacing(directory / WEIGHTS) as weights:
        save_model(model, str(weights), metadata={"format": "pt"})
        described_in.write_text(config + "\n")
    write_record(model, directory)


def _check_described(model: nn.Module, described: dict[str, Any]) -> None:
    """Raise `ValueError` unless what config.json builds has the model's weights: parts may be others by now."""
    with torch.device("meta"):
        expected = _entry(described)(**described["model_args"]).state_dict()
    own = model.state_dict()
    changed = list(expected.keys() ^ own.keys())
    changed += [k for k in expected.keys() & own.keys() if expected[k].shape != own[k].shape]
    if changed:
        raise ValueError(
            f"The model was changed after it was made ({', '.join(sorted(changed)[:3])}, ...), so that no config.json "
            "describes it: make it with its final sizes (depth, patch_size, ...), take reset_classifier for other "
            "classes, and merge adapters."
        )


def _save_pretrained(model: Any, directory: Path) -> None:
    """transformers' save_pretrained into a folder inside, then each file in its place, in the order of LAST."""
    partial = directory / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        written = sorted(
            partial.iterdir(), key=lambda path: (path.name in LAST and LAST.index(path.name) + 1, path.name)
        )
        for path in written:
            os.replace(path, directory / path.name)
        for stale in {p for pattern in OWN for p in directory.glob(pattern)} - {directory / p.name for p in written}:
            stale.unlink()  # of an older model: in another number of files, or converted
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_directory(directory: Path) -> Any:
    """See `formix.load`."""
    config = read_config(directory)
    if not (directory / WEIGHTS).is_file() and not (directory / f"{WEIGHTS}.index.json").is_file():
        raise ValueError(f"{directory} has a config.json but no {WEIGHTS}; the model was not saved completely.")
    with _damage_named(directory):
        model = _load_image(config, directory) if "architecture" in config else _load_text(config, directory)
    return model.eval()


@contextlib.contextmanager
def _damage_named(directory: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS} is damaged ({error}); save the model again.") from None


def create_from_directory(directory: Path, design: str | Design | None, **kwargs: Any) -> Any:
    """The model in a directory, in another design if one is given, every weight with a place carried over."""
    config = read_config(directory)
    if "model_type" in config:
        with _damage_named(directory):
            return _transformers_family(config).from_directory(directory, design, **kwargs)
    if kwargs.get("features_only"):
        raise ValueError(
            f"The features of a directory are timm's to take: timm.create_model('local-dir:{directory}', "
            "pretrained=True, features_only=True)."
        )
    arguments = {**config["model_args"], **kwargs}
    if design is not None:
        arguments["design"] = design
    try:
        model = _entry(config)(**arguments)
    except (TypeError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise ValueError(f"The model in {directory} cannot be built with {kwargs}: {error}") from None
    new_classes = "num_classes" in kwargs and kwargs["num_classes"] != config["model_args"].get("num_classes")
    inputs = _inputs(config)
    if not getattr(model, "dynamic_img_size", False):
        inputs["input_size"] = (model.in_chans, *image_size(model))  # type: ignore[misc]
    if new_classes:
        inputs = {k: v for k, v in inputs.items() if k not in OF_CLASSES}
    if model.in_chans != (channels := config["model_args"].get("in_chans", 3)):
        _log.warning("the patch embedding is adapted from %d to %d channels", channels, model.in_chans)
        for statistic in {"mean", "std"} & inputs.keys():
            inputs[statistic] = [sum(inputs[statistic]) / len(inputs[statistic])] * model.in_chans
    model.pretrained_cfg = {**model.pretrained_cfg, **inputs}
    try:
        with _damage_named(directory):
            missing, unexpected = _load(model, directory, new_classes)
    except RuntimeError as error:
        raise ValueError(f"The weights in {directory} do not fit this model: {error}") from None
    if missing:
        raise ValueError(
            f"{directory} has no weights for {len(missing)} parameters of this design ({', '.join(sorted(missing)[:3])}"
            ", ...): they would stay random. Train the design from scratch or convert the model."
        )
    if unexpected:
        _log.warning("weights without a place in this design: %s", ", ".join(sorted(unexpected)))
    return model


def _load(model: Any, directory: Path, new_classes: bool) -> tuple[set[str], set[str]]:
    """Load the weights, positions resampled for the model's image size; the names that the directory lacks, and those
    that the model has no place for. For other classes the classifier keeps its random weights."""
    stored = _input_channels(load_file(directory / WEIGHTS), model)
    fitted, new = model.adapt_checkpoint(dict(stored)), set()
    if resampled := [k for k, tensor in fitted.items() if k in stored and tensor.shape != stored[k].shape]:
        _log.warning("resampled from other sizes: %s", ", ".join(sorted(resampled)))
    if new_classes:
        head = model.get_classifier()  # a tuple in timm's distilled DeiT
        parts = head if isinstance(head, tuple) else (head,)
        places = {id(parameter) for part in parts for parameter in part.parameters()}
        new = {name for name, parameter in model.named_parameters() if id(parameter) in places}
    if new:
        _log.warning("the classifier is new (%s): %s has one for others", ", ".join(sorted(new)), directory)
    missing, unexpected = model.load_state_dict({k: v for k, v in fitted.items() if k not in new}, strict=False)
    return set(missing) - new, set(unexpected)


def _input_channels(stored: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The weights with the first convolution for the model's channels, as timm adapts its pretrained ones: summed over
    the three colours for one channel, repeated and scaled for others.

    Raises:
        ValueError: weights for another number of channels than three, of which timm knows no others.
    """
    first = model.pretrained_cfg.get("first_conv") or "patch_embed.proj"
    for name in (f"{part}.weight" for part in ((first,) if isinstance(first, str) else first)):
        if name not in stored or stored[name].dim() != 4 or stored[name].shape[1] == model.in_chans:
            continue
        if stored[name].shape[1] != 3:
            raise ValueError(
                f"in_chans is {model.in_chans}, and the weights are for {stored[name].shape[1]} channels; those for 3 "
                "can be adapted to others."
            )
        stored[name] = adapt_input_conv(model.in_chans, stored[name])
    return stored


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a formix or transformers directory.

    Raises:
        ValueError: missing or damaged, or a timm model that is not formix's.
    """
    path, config = directory / "config.json", stored_config(directory)
    if "architecture" in config and _entry(config) is None:
        raise ValueError(
            f"{path} is of timm's {config['architecture']!r}; load it with timm, or make a directory of formix's: "
            f"formix convert {directory} --design=softmax --out=DIR"
        )
    if "architecture" in config:
        if not isinstance(config.get("model_args"), dict) or not isinstance(config.get("pretrained_cfg"), dict):
            raise ValueError(f"{path} is damaged (it has no model_args or no pretrained_cfg); save the model again.")
        wanted = {"base", "design"} if config["architecture"] == "formix_vit" else set()
        if missing := sorted(wanted - set(config["model_args"])):
            raise ValueError(
                f"{path} is damaged (its model_args have no {' and no '.join(missing)}); save the model again."
            )
        if "num_classes" in config:
            config["model_args"].setdefault("num_classes", config["num_classes"])
    elif str(config["model_type"]).startswith("formix_") and config.get("design") is None:
        raise ValueError(
            f"{path} is damaged (it has no design, and without one no model is built); save the model again."
        )
    return config


def stored_config(directory: Path) -> dict[str, Any]:
    """config.json of any model, formix's, timm's or transformers'.

    Raises:
        ValueError: missing or damaged.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is no model directory: it has no config.json.")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); save the model again.") from None
    if not isinstance(config, dict) or not ("architecture" in config or "model_type" in config):
        raise ValueError(f"{path} is no model's config: it has neither 'architecture' nor 'model_type'.")
    return config


def _entry(config: dict[str, Any]) -> Any:
    """The entry point in timm's registry that builds what the config describes; None if it is not formix's."""
    from formix.models import timm_registry

    own = {"formix_vit": timm_registry.formix_vit, **timm_registry.ENTRIES}
    return own.get(str(config["architecture"]))


def _inputs(config: dict[str, Any]) -> dict[str, Any]:
    """What a model's pretrained_cfg gets of its directory."""
    return {**config["pretrained_cfg"], **about_classes(config)}


def _load_image(config: dict[str, Any], directory: Path) -> Any:
    model: Any = _entry(config)(**config["model_args"])
    model.pretrained_cfg = {**model.pretrained_cfg, **_inputs(config)}
    stored = load_file(directory / WEIGHTS)
    types = {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()}
    if len(types) == 1:
        model.to(types.pop())  # with the buffers that are not stored
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in stored:
            tensor.data = tensor.data.to(stored[name].dtype)
    try:
        model.load_state_dict(stored, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{directory / WEIGHTS} does not fit its config.json: {error}") from None
    remember_record(model, directory)
    return model


def _load_text(config: dict[str, Any], directory: Path) -> Any:
    if not str(config["model_type"]).startswith("formix_"):
        raise ValueError(
            f"{directory} is a transformers {config['model_type']!r} without a design; load it with transformers, or "
            f"make a directory of formix's: formix convert {directory} --design=softmax --out=DIR"
        )
    try:
        model = _transformers_family(config).from_directory(directory)
    except RuntimeError as error:  # shapes that differ
        raise ValueError(f"{directory / WEIGHTS} does not fit its config.json: {error}") from None
    # from the file's pages, where tensors begin anywhere, into aligned memory: elsewhere products round otherwise
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _transformers_family(config: dict[str, Any]) -> Any:
    """The module that knows the config's model type."""
    from formix.models import cvt

    return cvt if str(config["model_type"]) in ("cvt", "formix_cvt") else text
