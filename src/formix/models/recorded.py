"""The record of a conversion goes where its model goes: read beside the weights, written beside the weights.

What it says is `formix.conversion`'s matter; here it is a text and tensors.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from formix.records import replacing

_log = logging.getLogger("formix")
FILE, ASIDE = "conversion.json", "conversion.safetensors"


@dataclass(frozen=True, kw_only=True)
class Record:
    """Both files of a directory, in memory: the directory may be gone when they are asked for."""

    text: str  # conversion.json
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, directory: Path) -> Record:
        """The files of a directory.

        Raises:
            ValueError: they are damaged, or one is missing.
        """
        try:
            return cls(text=(directory / FILE).read_text(), tensors=load_file(directory / ASIDE))
        except (OSError, UnicodeDecodeError, SafetensorError) as error:
            raise ValueError(f"{directory / FILE} is damaged ({error}); convert the model again.") from None

    def write(self, directory: Path) -> None:
        """Each file under another name first; conversion.json, which makes a directory one of a conversion, last."""
        with replacing(directory / ASIDE) as tensors:
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in self.tensors.items()}, str(tensors))
        with replacing(directory / FILE) as text:
            text.write_text(self.text)


def remember_record(model: Any, directory: str | Path | None) -> None:
    """Keep the record in the directory that a model was loaded from, if there is one, as `model.conversion_record`."""
    if directory is None or not (Path(directory) / FILE).is_file():
        return
    try:
        model.conversion_record = Record.read(Path(directory))
    except ValueError as error:
        _log.warning("%s The model is loaded without.", error)


def write_record(model: nn.Module, directory: Path) -> None:
    """Write a converted model's record; of a model without, remove what an earlier one left there."""
    conversion = getattr(model, "conversion", None)
    record = getattr(model, "conversion_record", None) if conversion is None else conversion.to_record()
    if record is not None:
        record.write(directory)
        return
    for name in (FILE, ASIDE):
        (directory / name).unlink(missing_ok=True)


class Recorded:
    """For models of transformers': `from_pretrained` and `save_pretrained` with the record of a conversion."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        if pretrained_model_name_or_path is not None:
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
            remember_record(model, Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or ""))
        return loaded

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]
        if is_main_process:
            write_record(self, Path(save_directory))  # type: ignore[arg-type]
