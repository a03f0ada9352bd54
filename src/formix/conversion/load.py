"""Sources by name, directory or checkpoint file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from formix.conversion.source import FAMILIES


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
        try:
            config = json.loads((path / "config.json").read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path / 'config.json'} is damaged ({error}).") from None
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
    import timm

    if timm.is_model(str(name).partition(".")[0].removeprefix("hf-hub:timm/")):
        _refuse(name, "a name of timm's", task=task)
        return _timm(str(name), checkpoint, arguments)
    _refuse(name, "no directory and no name of timm's", checkpoint=checkpoint, model_args=arguments)
    return _transformers(str(name), None, task)


def _refuse(name: str | Path, kind: str, **given: Any) -> None:
    """Raise `ValueError` for arguments that such a source does not take."""
    if unused := [what for what, value in given.items() if value]:
        raise ValueError(f"{str(name)!r} is {kind}, which takes no {' and no '.join(unused)}; leave it out.")


def _timm(name: str, checkpoint: str | Path | None, arguments: dict[str, Any]) -> Any:
    import timm

    if checkpoint is not None and not Path(checkpoint).is_file():
        raise ValueError(f"{str(checkpoint)!r} is no file; give a checkpoint with weights of {name!r}.")
    try:
        if checkpoint is not None:
            return timm.create_model(name, checkpoint_path=str(checkpoint), **arguments).eval()
        return timm.create_model(name, pretrained=True, **arguments).eval()
    except (RuntimeError, TypeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"timm cannot load {name!r}: {reason}") from None


def _transformers(name: str, config: dict[str, Any] | None, task: str | None) -> Any:
    import transformers

    offline = config is not None
    try:
        loaded = transformers.AutoConfig.from_pretrained(name, local_files_only=offline)
        classes = [task] if task else list(loaded.architectures or [])
        model_class = getattr(transformers, classes[0], None) if classes else transformers.AutoModel
        if model_class is None:
            raise ValueError(f"{classes[0]!r} is no class of transformers; formix converts {FAMILIES}.")
        if getattr(loaded, "quantization_config", None):
            raise ValueError("The source is quantised; load it without quantisation and convert that.")
        return model_class.from_pretrained(name, local_files_only=offline).eval()
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name!r} is no directory, timm name or transformers id that can be loaded: {reason}"
        ) from None
