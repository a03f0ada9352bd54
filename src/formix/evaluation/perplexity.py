"""Perplexity of a language model."""

from __future__ import annotations

from torch import nn

from formix.data import Data
from formix.evaluation.suitable import check_data, reads_text
from formix.training.tasks import evaluate


def perplexity(model: nn.Module, data: Data, split: str = "test", *, batch_size: int = 32) -> float:
    """exp(nats per target) of a causal language model on a split; a target is a token of the data's tokenizer.

    Comparable between models with the same tokenizer and windows; bits per byte, which `evaluate` gives, between all.

    Raises:
        ValueError: data of another task, or in more tokens or longer windows than the model's.
    """
    if data.task != "causal-lm":
        raise ValueError(f"Perplexity needs text for language modelling; {data.name!r} is data for {data.task}.")
    if reads_text(model):  # of any other nothing says what it knows
        check_data(model, data, "The model")
    assert data.bytes_per_target is not None
    bits = evaluate(model, data, split, batch_size=batch_size) * data.bytes_per_target[split]
    return 2.0 ** min(bits, 1000.0)  # a double ends at 2^1024
