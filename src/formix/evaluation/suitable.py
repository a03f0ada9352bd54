"""Which data suit a model: what it reads, the numbers of its tokens, and labels that it answers with."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from formix.data import IMAGES, TEXTS, Data
from formix.data.base import SPLITS
from formix.data.text import load_tokenizer, own_tokenizer
from formix.models.image import image_size
from formix.models.inputs import image_inputs, knows_statistics, label_names
from formix.models.text import check_length, task_of

_log = logging.getLogger("formix")


def reads_text(model: Any) -> bool:
    """Whether a model, formix's or another, reads text; any other reads images."""
    return hasattr(getattr(model, "config", None), "vocab_size")


def check_source(model: Any, source: str, name: str, *, sequence_length: int) -> None:
    """What `check_data` says of data as far as it is known before they are loaded.

    Args:
        source: the name of data, as `load_data` takes it.
        name: what the model is called in the sentence, such as "The model".
        sequence_length: tokens of a window, or the most of a sentence.
    """
    text = reads_text(model)
    if source.partition(":")[0] in (IMAGES if text else TEXTS):
        raise wrong_kind(name, source, text=text)
    if text:
        check_length(model, sequence_length)


def check_data(model: Any, data: Data, name: str, *, own: bool = True) -> None:
    """Raise `ValueError` for data that a model cannot read: of another kind, images of another size or other channels,
    or text in longer pieces or other tokens.

    Args:
        model: formix's, timm's or transformers'.
        name: what the model is called in the sentence.
        own: the tokens are of a tokenizer that was chosen for the model, which may have fewer than the model.
    """
    images = data.task == "image-classification"
    if images == reads_text(model):
        raise wrong_kind(name, data.name, text=images)
    if images:
        _check_images(model, data, name)
        return
    assert data.sequence_length is not None
    check_length(model, data.sequence_length)
    has, needs = model.config.vocab_size, data.vocab_size or 0
    if has < needs or (has > needs and not own):
        raise ValueError(
            f"{name} knows {has} tokens and {data.name!r} has {needs}; read the text with the tokenizer that it was "
            "trained with (tokenizer=DIR)."
        )


def wrong_kind(name: str, source: str, *, text: bool) -> ValueError:
    """That a model reads text, or else images, which the data are not."""
    return ValueError(f"{name} reads {'text' if text else 'images'}, which {source!r} is not.")


def check_tokens(model: Any, tokens: int) -> None:
    """Raise `ValueError` for a tokenizer of more tokens than a model knows."""
    if tokens > (known := model.config.vocab_size):
        raise ValueError(
            f"The tokenizer has {tokens} tokens and this {type(model).__name__} knows {known}; read the text with the "
            "one that it was trained with."
        )


def tokenizer_for(directory: str | Path | None, asked: str | None) -> str | None:
    """The directory of the tokenizer that a model's text is read with: the one asked for, or the one that lies beside
    its weights in `directory`; None: neither.

    Raises:
        ValueError: the one asked for numbers words otherwise than the one beside the weights.
    """
    beside = None if directory is None else own_tokenizer(Path(directory))
    if asked is not None and beside is not None:
        check_numbers(load_tokenizer(asked), beside)
    return asked or beside


def check_numbers(tokenizer: Any, beside: str) -> None:
    """Raise `ValueError` for a tokenizer with a word that the one beside a model numbers otherwise, or lacks."""
    own = load_tokenizer(beside).get_vocab()
    other = [(number, word) for word, number in tokenizer.get_vocab().items() if own.get(word) != number]
    if other:
        number, word = min(other)
        raise ValueError(
            f"The text is read with a tokenizer in which {word!r} is token {number}; in the model's own, in "
            f"{beside!r}, it is {own.get(word, 'none')}: read it with that one (tokenizer={beside})."
        )


def image_side(model: Any) -> int | None:
    """The side of the square that a model's images are scaled to where nobody asks for another; None: they are taken
    as they are."""
    if getattr(model, "dynamic_img_size", False):
        return model.pretrained_cfg["input_size"][-1]
    height, width = image_size(model) or (None, None)
    return height if height == width else None


def normalised_for(model: Any, data: Data) -> Data:
    """The data under the statistics that the model's weights were trained with, if its config says which and they have
    its channels; `check_data` refuses others."""
    cfg = image_inputs(model)
    if "mean" not in cfg or "std" not in cfg or data.in_chans not in (1, len(cfg["mean"])):
        return data
    splits = {split: getattr(data, split).normalised(cfg["mean"], cfg["std"]) for split in SPLITS}
    of_bytes = {name: [255 * value for value in cfg[name]] for name in ("mean", "std")}
    provenance = {**data.provenance, "normalisation": {**of_bytes, "of": "pixels 0 to 255, the model's own"}}
    return replace(data, **splits, in_chans=len(cfg["mean"]), provenance=provenance)


def as_trained(model: Any, data: Data) -> Data:
    """The same where those statistics are known to be the model's own, and the data have the channels it reads."""
    fits = data.in_chans in (1, getattr(model, "in_chans", 3))
    return normalised_for(model, data) if fits and knows_statistics(model) else data


def _check_images(model: Any, data: Data, name: str) -> None:
    assert data.img_size is not None
    free = getattr(model, "dynamic_img_size", False)
    size = (None if free else image_size(model)) or data.img_size
    config = getattr(model, "config", None)  # transformers' models have their channels there
    channels = getattr(model, "in_chans", getattr(config, "num_channels", data.in_chans))
    if (channels, *size) != (data.in_chans, *data.img_size):
        raise ValueError(
            f"{name} takes images of {_times(channels, *size)}, and those of {data.name!r} are "
            f"{_times(data.in_chans, *data.img_size)}; img_size scales them, channels must agree."
        )
    patch = model.patch_embed.patch_size if free and not model.patch_embed.dynamic_img_pad else (1, 1)
    if any(side % part for side, part in zip(size, patch, strict=True)):
        raise ValueError(f"{name} has patches of {_times(*patch)}; img_size is {_times(*size)} and must be a multiple.")


def _times(*sizes: Any) -> str:
    return " x ".join(map(str, sizes))


def check_labels(model: Any, data: Data, name: str) -> None:
    """Raise `ValueError` for data of another task than the model's, of another number of classes, or of other ones.

    Args:
        model: one of formix's.
        data: labelled for some task.
        name: what the model is called in the sentence.
    """
    task = task_of(model)
    if data.task.replace("regression", "classification") != task:
        raise ValueError(f"{name} is for {task}, and {data.name!r} is for {data.task}.")
    if task not in ("image-classification", "sequence-classification"):
        return
    has = getattr(model, "num_classes", None) or getattr(getattr(model, "config", None), "num_labels", None)
    if has != data.num_classes:
        raise ValueError(f"{name} has {has or 'no'} classes and {data.name!r} has {data.num_classes}.")
    _check_names(label_names(model), data, name)


def _check_names(names: tuple[str, ...] | None, data: Data, model: str) -> None:
    """ValueError for other classes than the model's, or the same in another order; where no name is shared they may be
    the same in other words, and a warning says so."""
    if names is None or data.class_names is None or names == data.class_names:
        return
    number, (its, other) = next(
        (i, p) for i, p in enumerate(zip(names, data.class_names, strict=True)) if len({*p}) > 1
    )
    differ = f"{model} has {its!r} as class {number}, and {data.name!r} has {other!r}"
    if set(names) & set(data.class_names):
        raise ValueError(f"{differ}; give data with the model's classes, in their order.")
    _log.warning("%s; they are taken for the same", differ)
