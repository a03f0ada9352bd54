"""What a conversion is judged by: formix.evaluation's measures of a pretrained model, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from torch import nn

from formix.data import OnBadSample, load_data
from formix.evaluation.suitable import image_side


def metrics_for(
    *,
    tokenizer: str | Path | None = None,
    sts: str | None = None,
    probe: str | None = None,
    perplexity: str | None = None,
    sequence_length: int = 128,
    img_size: int | None = None,
    on_bad_sample: OnBadSample = "refuse",
) -> dict[str, Callable[[nn.Module], float]]:
    """name -> measure of a model; those whose data were not named are left out.

    Raises:
        ValueError: text to measure on without a tokenizer.
    """
    from formix import evaluation

    if tokenizer is None and (sts or perplexity):
        raise ValueError("tokenizer is missing for sts and perplexity; name the directory of the model's own.")

    metrics: dict[str, Callable[[nn.Module], float]] = {}
    if sts is not None:
        from transformers import AutoTokenizer

        words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        metrics["sts_spearman"] = lambda model: evaluation.sts_spearman(model, words, sts)
    for place in probe.split("+") if probe else ():
        images = functools.cache(functools.partial(load_data, place, on_bad_sample=on_bad_sample))
        metrics[f"probe {Path(place.partition(':')[2]).stem or place}"] = lambda model, load=images: (  # type: ignore[misc]
            evaluation.linear_probe(model, load(img_size=img_size or image_side(model)))
        )
    if perplexity is not None:
        text = load_data(perplexity, tokenizer=str(tokenizer), sequence_length=sequence_length)
        metrics["perplexity"] = lambda model: evaluation.perplexity(model, text)
    return metrics
