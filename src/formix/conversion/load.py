"""Sources by name, directory or checkpoint file."""

from __future__ import annotations

import logging
import re
import textwrap
from pathlib import Path
from typing import Any

import torch

from formix.conversion.source import FAMILIES
from formix.models.companions import COMPANIONS, SENTENCE_FILES
from formix.models.image import image_size

_log = logging.getLogger("formix")
LAYERS = r"\.(h|layer|layers)\.\d+\."  # in the names of transformers' tensors: one of a layer


def load_source(
    name: str | Path, *, checkpoint: str | Path | None = None, task: str | None = None, **arguments: Any
) -> Any:
    """The pretrained model that `name` says, in evaluation mode.

    Args:
        name: a directory (formix's, timm's or transformers'), a timm name, or a transformers id on the hub.
        checkpoint: weights for a timm name in place of the published ones: a file that timm can load.
        task: for transformers: the class, such as "BertForMaskedLM"; None: the one that the config names.
        **arguments: for timm's names: num_classes, img_size, ...

    Raises:
        ValueError: no such model, one that cannot be loaded, with the reason, or arguments that it does not take.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        from formix.models.directory import stored_config

        config = stored_config(path)
        kind = str(config.get("model_type", ""))
        if kind.startswith("formix_") or str(config.get("architecture", "")).startswith("formix_"):
            from formix.models import load

            _refuse(name, "a directory of formix's", checkpoint=checkpoint, task=task, model_args=arguments)
            return load(path)
        if "model_type" in config:
            _refuse(name, "a directory of transformers'", checkpoint=checkpoint, model_args=arguments)
            return _transformers(str(path), config, task)
        _refuse(name, "a directory of timm's", checkpoint=checkpoint, task=task)
        return _timm(f"local-dir:{path}", None, arguments)
    if path.is_dir():
        raise ValueError(f"{str(name)!r} is no model directory: it has no config.json.")
    if path.is_file():
        raise ValueError(f"{str(name)!r} is a file; give its directory, or a name of timm's with --checkpoint={name}.")
    import timm

    if timm.is_model(str(name).partition(".")[0].removeprefix("hf-hub:timm/")):
        _refuse(name, "a name of timm's", task=task)
        return _timm(str(name), checkpoint, arguments)
    _refuse(name, "no directory and no name of timm's", checkpoint=checkpoint, model_args=arguments)
    return _transformers(str(name), None, task)


def files_beside(name: str | Path, source: Any) -> Path:
    """The directory with what lies beside the weights of `source`, loaded from `name`: `name` itself or, for a
    transformers id, the hub's snapshot of it, into which tokenizer and other small files are fetched if need be."""
    if Path(name).is_dir() or not hasattr(source, "config"):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=[*COMPANIONS, *SENTENCE_FILES]))
    except Exception as error:  # whatever the hub raises of networks and caches
        _log.warning("no tokenizer or other file beside the weights of %s was found (%s)", name, _reason(error))
        return Path(name)


def _refuse(name: str | Path, kind: str, **given: Any) -> None:
    """Raise `ValueError` for arguments that such a source does not take."""
    if unused := [what for what, value in given.items() if value]:
        raise ValueError(f"{str(name)!r} is {kind}, which takes no {' and no '.join(unused)}; leave it out.")


def _timm(name: str, checkpoint: str | Path | None, arguments: dict[str, Any]) -> Any:
    import timm

    if checkpoint is not None and not Path(checkpoint).is_file():
        raise ValueError(f"{str(checkpoint)!r} is no file; give a checkpoint with weights of {name!r}.")
    # a classifier for other classes is made afterwards: timm would let any other weight be missing too
    classes = None if checkpoint else arguments.pop("num_classes", None)
    pretrained = {"checkpoint_path": str(checkpoint)} if checkpoint else {"pretrained": True}
    _check_family(name, arguments)
    try:
        model: Any = timm.create_model(name, **pretrained, **arguments).eval()
    except Exception as error:  # whatever timm raises of damaged files and odd arguments
        raise ValueError(f"timm cannot load {name!r} ({_reason(error)}).") from None
    if "img_size" in arguments and (size := image_size(model)):  # a name that reads any size keeps its own in the cfg
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (model.in_chans, *size)}
    if classes is not None and classes != model.num_classes:
        if classes:
            _log.warning("the classifier is new: %s has one for %d classes, not %d", name, model.num_classes, classes)
        model.reset_classifier(classes)
    return model


def _check_family(name: str, arguments: dict[str, Any]) -> None:
    """Raise `ValueError` for a timm model that cannot be converted, before its weights are fetched."""
    import timm

    from formix.conversion.timm_source import open_timm

    try:
        with torch.device("meta"):
            model = timm.create_model(name, **arguments)
    except Exception:  # odd arguments, for which the one with weights has words; or a model that needs numbers
        return
    open_timm(model)


def _transformers(name: str, config: dict[str, Any] | None, task: str | None) -> Any:
    import transformers

    offline = config is not None
    try:
        loaded = transformers.AutoConfig.from_pretrained(name, local_files_only=offline)
    except Exception as error:  # whatever transformers raises of damaged files
        raise ValueError(
            f"{name!r} is no directory, timm name or transformers id that can be loaded ({_reason(error)})."
        ) from None
    if getattr(loaded, "quantization_config", None):
        raise ValueError("The source is quantised; load it without quantisation and convert that.")
    model_class = _class_of(transformers, loaded, task)
    try:
        model, report = model_class.from_pretrained(name, local_files_only=offline, output_loading_info=True)
    except Exception as error:
        raise ValueError(f"transformers cannot load {name!r} ({_reason(error)}).") from None
    if absent := sorted(k for k in report["missing_keys"] if re.search(LAYERS, f".{k}")):
        raise ValueError(
            f"{name!r} has no weights for {len(absent)} tensors of its layers ({absent[0]}, ...), and they would stay "
            "random; its config.json is not that of its weights."
        )
    if model.base_model is model and any(k.startswith("pooler.") for k in report["missing_keys"]):
        _log.warning("%s has no weights of a pooler, and is read without one", name)
        model.pooler = None
    return model.eval()


def _class_of(transformers: Any, config: Any, task: str | None) -> Any:
    """The class asked for, else the one that the config names, else the family's without a head."""
    name = task or next(iter(config.architectures or []), "AutoModel")
    if name.startswith("AutoModel") and hasattr(transformers, name):
        return getattr(transformers, name)
    found: Any = getattr(transformers, name, None)
    if transformers.PreTrainedModel not in getattr(found, "__mro__", ()):
        raise ValueError(f"{name!r} is no model of transformers; formix converts {FAMILIES}.")
    if found.config_class is not type(config):
        raise ValueError(f"{name!r} is not a class for the source, a model of the type {config.model_type!r}.")
    return found


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error).rstrip('. '), 300, placeholder=' ...')}"
