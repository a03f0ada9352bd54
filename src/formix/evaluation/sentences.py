"""Sentence embeddings: mean-pooled hidden states, judged by how their cosines rank pairs of sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formix.data.glue import TASKS, read_tsv
from formix.data.text import vocabulary_size
from formix.models.modes import evaluating


@torch.no_grad()
def sentence_embeddings(
    model: Any, tokenizer: Any, sentences: Sequence[str], *, max_length: int = 256, batch_size: int = 64
) -> Tensor:
    """Embeddings [N, C] of unit length: the mean of the last hidden states over a sentence's tokens.

    As sentence-transformers' mean pooling with normalisation.

    Args:
        model: a transformers encoder, formix's or a stock one; of a model with a head, the trunk is read.
        tokenizer: its tokenizer.
        sentences: N texts; cut to `max_length` tokens, or those that the model has positions for.
        batch_size: sentences in one forward pass, of similar length.

    Raises:
        ValueError: a tokenizer with more tokens than the model, or a text in which it finds none.
    """
    from formix.evaluation.suitable import check_tokens
    from formix.models.text import positions

    check_tokens(model, vocabulary_size(tokenizer))
    trunk = model.base_model
    max_length = min(max_length, positions(model.config) or max_length)
    device = next(trunk.parameters()).device
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # little padding
    embeddings = torch.empty(len(sentences), trunk.config.hidden_size, device=device)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            texts = [sentences[i] for i in rows]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            counts = batch["attention_mask"].sum(1).tolist()
            if 0 in counts:
                raise ValueError(f"{texts[counts.index(0)]!r} has no tokens, and so no embedding; leave it out.")
            batch = batch.to(device)
            hidden = trunk(**batch).last_hidden_state.float()  # [B, T, C]
            embeddings[rows] = mean_pooled(hidden, batch["attention_mask"])
    return F.normalize(embeddings, dim=1)


def mean_pooled(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """[B, N, C] -> [B, C], the mean of the tokens that the mask [B, N] shows."""
    if mask is None:
        return tokens.mean(1)
    weights = mask[..., None].to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


def sts_spearman(model: Any, tokenizer: Any, file: str | Path, *, batch_size: int = 64) -> float:
    """Spearman correlation of embeddings' cosines with the human scores of an STS-B file in GLUE's layout.

    Args:
        file: the benchmark's train.tsv or dev.tsv, or any TSV with columns sentence1, sentence2 and score.

    Raises:
        ValueError: the file is missing or has another layout.
    """
    from scipy.stats import spearmanr

    pairs, scores = read_tsv(Path(file), TASKS["STS-B"])
    first, second = (
        sentence_embeddings(model, tokenizer, column, batch_size=batch_size) for column in zip(*pairs, strict=True)
    )
    cosines = (first.double() * second.double()).sum(1)  # [N]
    return float(spearmanr(cosines.cpu().numpy(), scores).statistic)
