"""Whole networks by name, and their directories on disk."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from torch import nn

from formix.design import Design


def create_model(
    name: str | Path, design: str | Design | None = None, *, pretrained: bool = False, **kwargs: Any
) -> Any:
    """A model with its blocks in `design`.

    Args:
        name: timm's name of a Vision Transformer (``"vit_small_patch16_224"``, ``"eva02_tiny_patch14_224"``) or an XCiT
            (``"xcit_small_12_p16_224"``), a published model (``"sima_small_12_p16"``, ``"activator_32_p4"``,
            ``"relu_vit_small_patch16_224"``; `formix.models.published.PUBLISHED`), a CvT (``"cvt-13"``,
            ``"cvt-21"``), a text model (``"gpt2"``, ``"gpt2-nano"``, ``"bert-base-uncased"``, ``"bert-mini"``;
            `formix.models.text.SIZES`), or a directory: one that `formix.save` wrote or a transformers one (BERT,
            RoBERTa, GPT-2, Llama, CvT), whose weights are carried over; `formix.convert` reads more families.
        design: a design's name, combination or `Design`; None: the directory's or published model's own, or softmax.
        pretrained: load timm's published weights (images only; needs a network the first time).
        **kwargs: for images timm's arguments (num_classes, img_size, patch_size, in_chans, drop_path_rate, ...); for
            text `task` ("causal-lm", "masked-lm", "sequence-classification", ...) and fields of the transformers
            config (num_labels, n_layer, hidden_size, vocab_size, ...).

    Raises:
        ValueError: an unknown name or argument, or a design that the model cannot have.
    """
    from formix.models import directory, published, text, vit

    if not isinstance(name, str | Path):
        raise ValueError(
            f"name is {name!r}; it must be a model's name, such as 'vit_small_patch16_224', or a directory."
        )
    path = Path(name)
    if (path / "config.json").is_file():
        if pretrained:
            raise ValueError("pretrained=True names timm's published weights; a directory brings its own.")
        return directory.create_from_directory(path, design, **kwargs)
    if path.is_dir() or "/" in str(name):
        raise ValueError(f"{str(name)!r} is no directory with a config.json; save a model there first.")
    if str(name) in published.PUBLISHED:
        return published.create_published(str(name), design, pretrained=pretrained, **kwargs)
    if str(name).startswith("xcit_"):
        from formix.models import xcit

        return xcit.create_xcit(str(name), design, pretrained=pretrained, **kwargs)
    chosen = "softmax" if design is None else design
    if str(name).startswith("cvt-"):
        from formix.models import cvt

        if pretrained:
            raise ValueError(f"pretrained=True is for timm's names; for {name!r} give the weights' directory instead.")
        return cvt.create_cvt(str(name), chosen, **kwargs)
    if str(name) in text.SIZES:
        if pretrained:
            raise ValueError(f"pretrained=True is for timm's names; for {name!r} give the weights' directory instead.")
        return text.create_text_model(str(name), chosen, **kwargs)
    _check_name(str(name))
    return vit.create_vit(str(name), chosen, pretrained=pretrained, **kwargs)


def _check_name(name: str) -> None:
    """Raise `ValueError` for a name that timm does not know, with the nearest of those that formix takes."""
    import timm

    from formix.models import cvt, published, text

    if timm.is_model(name):
        return
    known = [*text.SIZES, *published.PUBLISHED, *cvt.SIZES, *timm.list_models(["vit_*", "deit*", "xcit_*"])]
    near = [other for other in known if other.startswith(name)] or difflib.get_close_matches(name, known)
    advice = f"did you mean {' or '.join(near[:3])}?" if near else f"text models are {', '.join(text.SIZES)}."
    raise ValueError(
        f"{name!r} is no model that formix knows; {advice} timm.list_models('vit_*') lists Vision Transformers, and a "
        "directory with a config.json will do as well."
    )


def save(model: nn.Module, directory: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors``; the config holds the design. A converted model's record goes
    beside them, be the model converted here or loaded.

    Raises:
        ValueError: not a model of formix's, or an image model whose parts were replaced since it was made.
    """
    from formix.models.directory import save_directory

    save_directory(model, Path(directory))


def load(directory: str | Path) -> Any:
    """The model that `save` wrote, in evaluation mode, with the same logits, in the type of its weights.

    Raises:
        ValueError: not a directory of formix's, a design of a newer version, or weights that do not fit.
    """
    from formix.models.directory import load_directory

    return load_directory(Path(directory))
