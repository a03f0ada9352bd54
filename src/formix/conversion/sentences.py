"""Unlabelled sentences for recovery, in batches of like length."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formix.data import Batch, BatchDataset, Data
from formix.data.glue import TASKS, read_columns
from formix.data.text import content_hash, text_files, tokenizer_identity, vocabulary_size

MAX_SENTENCES = 256  # in a batch


class Sentences(BatchDataset):
    """Batches of sentences of nearly one length: index i is the i-th batch, not the i-th sentence.

    Sentences are sorted by length and cut into batches of at most `tokens` tokens, padding included, so that little of
    a batch is padding; the sampler's order is over batches.
    """

    def __init__(self, ids: Sequence[list[int]], *, pad: int, tokens: int, seed: int) -> None:
        order = list(range(len(ids)))
        random.Random(seed).shuffle(order)  # sentences of one length, in no order of theirs
        order.sort(key=lambda i: len(ids[i]))
        self.pad, self.batches = pad, []
        batch: list[list[int]] = []
        for i in order:
            longest = len(ids[i])
            if batch and (longest * (len(batch) + 1) > tokens or len(batch) == MAX_SENTENCES):
                self.batches.append(batch)
                batch = []
            batch.append(ids[i])
        if batch:
            self.batches.append(batch)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = [row for index in indices for row in self.batches[index]]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in rows])
        mask: Tensor = (torch.arange(longest) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(len(rows))}


def load_sentences(
    name: str,
    tokenizer: Any,
    *,
    tokens: int,
    longest: int,
    held_out: float,
    seed: int,
    limit: int | None = None,
) -> Data:
    """Sentences from one or several places joined by '+': ``glue:DIR/TASK`` (its train.tsv, labels unread) or
    ``text:PATH`` (files as `load_data` reads them; lines are divided into sentences). ``*N`` behind a place has its
    sentences N times in an epoch.

    Raises:
        ValueError: no such place, a damaged file, or no sentence in it.
    """
    times: dict[str, int] = {}  # a sentence -> how often it is in an epoch
    for place in name.split("+"):
        place, _, number = place.partition("*")
        if number and not (number.isdecimal() and int(number)):
            raise ValueError(f"{number!r} behind {place!r} is no number of times; write {place}*4.")
        for text in filter(str.strip, _read(place)):
            times[text] = max(times.get(text, 0), int(number or 1))
    texts = list(times)
    random.Random(seed).shuffle(texts)
    texts = texts[:limit]
    if len(texts) < 10:
        raise ValueError(f"{name!r} has {len(texts)} sentences; recovery needs 10 or more, within limit too.")
    ids = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
    held = min(max(1, round(held_out * len(ids))), len(ids) - 1)
    train = [row for row, text in zip(ids[held:], texts[held:], strict=True) for _ in range(times[text])]
    pad = tokenizer.pad_token_id or 0
    sets = [Sentences(part, pad=pad, tokens=tokens, seed=seed) for part in (train, ids[:held])]
    return Data(
        name=name,
        task="sequence-regression",
        train=sets[0],
        validation=sets[1],
        test=sets[1],
        metric="spearman",
        higher_is_better=True,
        chance=0.0,
        sequence_length=longest,
        tokenizer=tokenizer,
        vocab_size=vocabulary_size(tokenizer),
        provenance={
            "source": name,
            "counts": {"train": len(train), "different": len(ids) - held, "held out": held},
            "preprocessing": f"sentences cut at {longest} tokens, batches of up to {tokens} tokens",
            "sha256": content_hash("\n".join(texts).encode(), tokenizer_identity(tokenizer)),
        },
    )


def _read(place: str) -> list[str]:
    kind, _, argument = place.partition(":")
    path = Path(argument)
    if kind == "glue" and path.name in TASKS:
        task = TASKS[path.name]
        return [sentence for row in read_columns(path / "train.tsv", task, task.columns) for sentence in row]
    if kind == "text" and argument:
        lines_of = (line for file in text_files(argument) for line in _text(file).splitlines())
        return [part for line in lines_of for part in re.split(r"(?<=[.!?]) ", line.strip()) if len(part.split()) > 3]
    raise ValueError(f"{place!r} has no sentences; give glue:DIR/TASK or text:PATH, several joined by '+'.")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8 text ({error}).") from None
