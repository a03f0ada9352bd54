"""What a saved model says of pictures and texts that nobody has labelled."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formix.data.encoded import EncodedImage
from formix.data.text import vocabulary_size
from formix.evaluation.suitable import check_tokens
from formix.models.inputs import image_inputs, independent_classes, label_names
from formix.models.text import positions, task_of
from formix.training.tasks import forward

_log = logging.getLogger("formix")
TEXT_TASKS = {  # task -> pipeline of transformers
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "masked-lm": "fill-mask",
    "causal-lm": "text-generation",
}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one input: a class or token with its score for each of the best, or a text, or features."""

    input: str  # the file's name, or the text itself
    labels: tuple[str, ...] = ()  # best first
    scores: tuple[float, ...] = ()  # probabilities; of a regression the value
    runs: tuple[str, ...] | None = None  # of a class for each run of tokens: the runs, in their order in the text
    text: str | None = None  # what a language model adds
    features: tuple[float, ...] | None = None  # of a model without an output for classes


def predict_images(
    model: Any, images: Sequence[EncodedImage], *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """The classes of pictures, which are prepared as the model's config says (timm's evaluation transform).

    Args:
        model: an image model, from `formix.load`; without a classifier (num_classes=0) its pooled features are given.
        images: files, RGB or grey; a model of one channel sees them in grey.
        top: how many classes, best first.

    Raises:
        ValueError: a picture that cannot be read, or a model of other channels than 1 or 3.
    """
    from timm.data import create_transform, resolve_data_config

    prepared = resolve_data_config(pretrained_cfg=image_inputs(model), model=model)
    channels = prepared["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"The model takes images of {channels} channels, and pictures have 1 (grey) or 3 (RGB).")
    transform: Callable[[Any], Tensor] = create_transform(**prepared, is_training=False)
    names, own = label_names(model), next(model.parameters())
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        pixels = [transform(image.rgb().convert("RGB" if channels == 3 else "L")) for image in batch]
        with torch.inference_mode():
            logits = forward(model, {"pixel_values": torch.stack(pixels).to(own)}).float()  # [B, classes]
        scores = logits.sigmoid() if independent_classes(model) else logits.softmax(-1)
        for image, row, features in zip(batch, scores, logits, strict=True):
            if getattr(model, "num_classes", None) == 0:
                yield Prediction(input=image.name, features=tuple(features.tolist()))
                continue
            values, classes = row.topk(min(top, len(row)))
            labels = tuple(str(c) if names is None else names[c] for c in classes.tolist())
            yield Prediction(input=image.name, labels=labels, scores=tuple(values.tolist()))


def predict_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    top: int = 5,
    batch_size: int = 32,
    new_tokens: int = 64,
    temperature: float = 0.0,
) -> Iterator[Prediction]:
    """What a text model says, by transformers' pipelines.

    Classes with their probabilities, or the value of a regression; a class for every run of tokens; the best tokens in
    the place of [MASK]; what follows a text; an embedding (the mean of the last hidden states, of unit length).

    Args:
        model: from `formix.load`.
        tokenizer: its tokenizer.
        texts: a tab separates the two sentences of a pair.
        new_tokens: how many tokens a language model adds.
        temperature: of the draws of a language model; 0: always the most probable token.

    Raises:
        ValueError: a task that takes more than a text (question answering, multiple choice), a tokenizer with more
            tokens than the model, a text without [MASK] for a masked language model or too long for it, one without any
            token, or with no room left for new ones.
    """
    task = task_of(model)
    check_tokens(model, vocabulary_size(tokenizer))
    tokenizer = _for_reading(model, tokenizer)
    if task == "features":
        from formix.evaluation.sentences import sentence_embeddings

        _check_lengths(tokenizer, [[text] for text in texts])
        length = tokenizer.model_max_length
        vectors = sentence_embeddings(model, tokenizer, texts, max_length=length, batch_size=batch_size)
        for text, vector in zip(texts, vectors, strict=True):
            yield Prediction(input=text, features=tuple(vector.tolist()))
        return
    if task not in TEXT_TASKS:
        raise ValueError(f"The model is for {task}, which takes more than a text; use formix.load and transformers.")
    from transformers import pipeline

    pipe: Any = pipeline(TEXT_TASKS[task], model=model, tokenizer=tokenizer)  # type: ignore[call-overload]
    if task == "causal-lm":
        yield from _continued(pipe, texts, new_tokens, temperature)
    elif task == "masked-lm":
        yield from _filled(pipe, texts, top)
    elif task == "token-classification":
        _check_lengths(tokenizer, [[text] for text in texts])
        for text, found in zip(texts, pipe(list(texts), aggregation_strategy="simple"), strict=True):
            yield Prediction(
                input=text,
                labels=tuple(part["entity_group"] for part in found),
                scores=tuple(float(part["score"]) for part in found),
                runs=tuple(text[part["start"] : part["end"]] for part in found),
            )
    else:
        _check_lengths(tokenizer, [text.split("\t", 1) for text in texts])
        regression = model.config.num_labels == 1
        function = "none" if regression else "sigmoid" if independent_classes(model) else "softmax"
        pairs = [dict(zip(("text", "text_pair"), text.split("\t", 1), strict=False)) for text in texts]
        size = 1 if model.config.pad_token_id is None else batch_size  # by which decoders find the last token
        found = pipe(pairs, top_k=top, batch_size=size, function_to_apply=function, truncation=True)
        named = label_names(model) is not None
        for text, best in zip(texts, found, strict=True):
            labels = tuple(one["label"] if named else one["label"].removeprefix("LABEL_") for one in best)
            scores = tuple(one["score"] for one in best)
            yield Prediction(input=text, labels=() if regression else labels, scores=scores)


def _continued(pipe: Any, texts: Sequence[str], new_tokens: int, temperature: float) -> Iterator[Prediction]:
    room = positions(pipe.model.config)
    how: dict[str, Any] = {"do_sample": False}
    if temperature:
        how = {"do_sample": True, "temperature": temperature}
        if pipe.model.generation_config.top_k is None:
            how["top_k"] = 0  # of all tokens; transformers would draw of the 50 most probable ones
    for text in texts:
        used = len(pipe.tokenizer(text)["input_ids"])
        if not used or (room is not None and used + new_tokens > room):
            allowed = "the text needs one or more" if room is None else f"the model has {room} positions"
            allowed += "" if used or room is None else ", and a text needs one"
            raise ValueError(
                f"{text[:40]!r} has {used} tokens and {new_tokens} are to follow; {allowed}: give another text"
                f"{', or fewer --new-tokens' if used else ''}."
            )
        found = pipe(text, max_new_tokens=new_tokens, return_full_text=False, **how)
        yield Prediction(input=text, text=found[0]["generated_text"])


def _filled(pipe: Any, texts: Sequence[str], top: int) -> Iterator[Prediction]:
    mask, length = pipe.tokenizer.mask_token, pipe.tokenizer.model_max_length
    for text in texts:
        if text.count(mask) != 1:
            raise ValueError(f"{text[:40]!r} has {text.count(mask)} times {mask}; it must be there once.")
        if (count := len(pipe.tokenizer(text, verbose=False)["input_ids"])) > length:
            raise ValueError(f"{text[:40]!r} has {count} tokens and the model reads {length}; give a shorter text.")
        found = pipe(text, top_k=min(top, pipe.model.config.vocab_size))
        labels = tuple(one["token_str"] for one in found)
        yield Prediction(input=text, labels=labels, scores=tuple(one["score"] for one in found))


def _for_reading(model: Any, tokenizer: Any) -> Any:
    """A copy of the tokenizer that cuts where the model has no more positions and fills up behind the texts of a batch,
    with any token if it has none for that: the mask hides it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions(model.config) or 2**30)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None and task_of(model) in ("features", "sequence-classification"):
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _check_lengths(tokenizer: Any, texts: Sequence[Sequence[str]]) -> None:
    """Say how many texts, or pairs of them, are cut; ValueError for one without any token."""
    length = tokenizer.model_max_length
    counts = [len(tokenizer(*text, truncation=False, verbose=False)["input_ids"]) for text in texts]
    if 0 in counts:
        raise ValueError(f"{texts[counts.index(0)][0]!r} has no tokens for the model to read; give another text.")
    if cut := sum(count > length for count in counts):
        _log.warning("%d of %d texts have more than %d tokens and are cut there", cut, len(texts), length)
