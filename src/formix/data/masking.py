"""Masked language modelling on text: BERT's objective (Devlin et al. 2018, section 3.1, task 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from formix.data.base import SPLITS, Batch, Data
from formix.data.draws import DrawnDataset, own_randomness, seed_all
from formix.data.text import WindowDataset

BYTE_MASK, BYTE_PAD = 256, 257  # what follows the 256 bytes where the tokens are bytes
IGNORED = -100  # label of a token that is not predicted


def masked_lm(data: Data, *, probability: float = 0.15, seed: int = 0) -> Data:
    """Language-modelling data as masked language modelling.

    Windows of `sequence_length` tokens, with the tokenizer's first and last special token around them where it has
    such ([CLS] ... [SEP]). Training windows are masked anew at every draw (RoBERTa's dynamic masking); validation and
    test windows always in the same way. The metric is the perplexity of the masked tokens.

    Raises:
        ValueError: data that are no language modelling, a tokenizer without mask token, a probability outside (0, 1),
            or windows that the special tokens fill.
    """
    if data.task != "causal-lm":
        raise ValueError(f"masked-lm needs text, and {data.name!r} is {data.task}; use text:PATH, stdlib or hf:NAME.")
    if not 0 < probability < 1:
        raise ValueError(f"mask_probability is {probability}; it must lie between 0 and 1, both excluded.")
    tokenizer, length = data.tokenizer, data.sequence_length
    assert length is not None
    assert data.vocab_size is not None
    assert data.bytes_per_target is not None
    first: list[int] = []
    last: list[int] = []
    if tokenizer is None:
        mask, vocab_size, words = BYTE_MASK, 258, 256
    elif tokenizer.mask_token_id is None:
        raise ValueError(f"The tokenizer of {data.name!r} has no mask token; use BERT's or RoBERTa's.")
    else:
        mask, vocab_size, words = tokenizer.mask_token_id, data.vocab_size, data.vocab_size
        first = [t for t in (tokenizer.cls_token_id,) if t is not None]
        last = [t for t in (tokenizer.sep_token_id,) if t is not None]
    room = length - len(first) - len(last)
    if room < 1:
        raise ValueError(f"sequence_length={length} leaves no room for words beside the special tokens.")
    sets: dict[str, MaskedWindows] = {}
    for number, split in enumerate(SPLITS):
        windows = getattr(data, split)
        assert isinstance(windows, WindowDataset)
        sets[split] = MaskedWindows(
            windows.tokens[: len(windows.tokens) // room * room].view(-1, room),
            first=first,
            last=last,
            mask=mask,
            words=words,
            probability=probability,
            seed=seed if split == "train" else 0,
            fixed=None if split == "train" else number,
        )
    unigram = data.chance * data.bytes_per_target["test"]  # bits per token
    return dataclasses.replace(
        data,
        task="masked-lm",
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        metric="perplexity",
        higher_is_better=False,
        chance=2**unigram,
        vocab_size=vocab_size,
        baselines={},
        bytes_per_target=None,
        provenance={
            **data.provenance,
            "counts": {split: len(sets[split]) for split in SPLITS},
            "masking": f"{probability:g} of the tokens: 80 % [MASK], 10 % another token, 10 % left as they are",
        },
    )


class MaskedWindows(DrawnDataset):
    """Windows of tokens [W, T] in which some are to be predicted.

    Of a window's T tokens max(1, round(probability T)) are chosen, as in BERT's code: with as many targets in every
    window, the mean over parts of a batch is that over the batch. Of the chosen ones 80 % become `mask`, 10 % a token
    drawn from `words` and 10 % stay. `labels` are the tokens at the chosen places and -100 elsewhere. The randomness of
    a window derives from (seed, window, draw); with `fixed` all draws are the same.
    """

    def __init__(
        self,
        windows: Tensor,
        *,
        first: Sequence[int] = (),
        last: Sequence[int] = (),
        mask: int,
        words: int,
        probability: float,
        seed: int,
        fixed: int | None = None,
    ) -> None:
        self.windows, self.first, self.last = windows, list(first), list(last)
        self.mask, self.words = mask, words
        self.count = max(1, round(probability * windows.shape[1]))
        self.seed, self.fixed = seed, fixed

    def __len__(self) -> int:
        return len(self.windows)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        draws = self.draws(indices)
        tokens = self.windows[[window for window, _ in draws]].long()  # [B, T]
        chosen, kind, word = [], [], []
        with own_randomness():
            for window, draw in draws:
                seed_all(self.seed, window, draw if self.fixed is None else self.fixed)
                uniform = torch.rand(2, tokens.shape[1])
                chosen.append(uniform[0].argsort().argsort() < self.count)
                kind.append(uniform[1])
                word.append(torch.randint(self.words, tokens.shape[1:]))
        places, kinds = torch.stack(chosen), torch.stack(kind)  # [B, T]
        labels = tokens.masked_fill(~places, IGNORED)
        inputs = torch.where(places & (kinds < 0.9), torch.stack(word), tokens)
        inputs[places & (kinds < 0.8)] = self.mask
        size = len(draws)
        before, after = (torch.tensor(t, dtype=torch.int64).expand(size, len(t)) for t in (self.first, self.last))
        return {
            "input_ids": torch.cat([before, inputs, after], 1),
            "labels": torch.cat([torch.full_like(before, IGNORED), labels, torch.full_like(after, IGNORED)], 1),
        }
