"""Sentence tasks in GLUE's official TSV layout: DIR/TASK/train.tsv and dev.tsv."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from formix.data.base import SPLITS, Batch, BatchDataset, Data, Metric, Request, majority_accuracy
from formix.data.text import content_hash, load_tokenizer, tokenizer_identity, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 8000
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Where a GLUE task keeps its sentences and labels."""

    header: bool = True
    columns: tuple[str, ...]  # the sentences; of a file without header: their numbers
    label: str
    classes: dict[str, str] | None  # as written -> name, in the order of the class indices; None: a score
    metric: Metric
    note: str = ""


TASKS = {
    "CoLA": Task(
        header=False,
        columns=("3",),
        label="1",
        classes={"0": "unacceptable", "1": "acceptable"},
        metric="matthews_corrcoef",
    ),
    "SST-2": Task(
        columns=("sentence",),
        label="label",
        classes={"0": "negative", "1": "positive"},
        metric="accuracy",
        note="training rows are phrases of the same reviews, so held-out validation overlaps them; dev does not",
    ),
    "RTE": Task(
        columns=("sentence1", "sentence2"),
        label="label",
        classes={"entailment": "entailment", "not_entailment": "not_entailment"},
        metric="accuracy",
    ),
    "STS-B": Task(columns=("sentence1", "sentence2"), label="score", classes=None, metric="spearman"),
}


class SentenceDataset(BatchDataset):
    """Tokenised sentences: `input_ids` and `token_type_ids` [N, T] padded on the right, `lengths` [N], `labels` [N]."""

    def __init__(self, input_ids: Tensor, token_type_ids: Tensor, lengths: Tensor, labels: Tensor) -> None:
        self.input_ids, self.token_type_ids, self.lengths, self.labels = input_ids, token_type_ids, lengths, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = list(indices)
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        return {
            "input_ids": self.input_ids[rows, :longest],  # [B, T]
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
            "token_type_ids": self.token_type_ids[rows, :longest],
            "labels": self.labels[rows],
        }


def load_glue(request: Request) -> Data:
    """`glue:DIR/TASK` for CoLA, SST-2, RTE and STS-B with their official metrics.

    dev.tsv is the test split; validation is held out of train.tsv, stratified by class. Without a tokenizer, a
    lower-case WordPiece vocabulary of at most 8,000 is trained on the sentences of the train split. ValueError for an
    unknown task, missing files or columns, a row or label that the layout does not allow, a `sequence_length` that has
    no room for words.
    """
    folder = Path(request.argument)
    if folder.name not in TASKS:
        raise ValueError(f"Unknown GLUE task {folder.name!r} in {request.name!r}; known are {', '.join(TASKS)}.")
    task = TASKS[folder.name]
    train_rows, train_labels = read_tsv(folder / "train.tsv", task)
    test_rows, test_labels = read_tsv(folder / "dev.tsv", task)
    chosen = request.divide(len(train_rows), train_labels if task.classes else None, ("validation",))
    kept, held = chosen["train"], chosen["validation"]
    rows = {"train": [train_rows[i] for i in kept], "validation": [train_rows[i] for i in held], "test": test_rows}
    labels = dict(
        zip(SPLITS, map(torch.from_numpy, (train_labels[kept], train_labels[held], test_labels)), strict=True)
    )

    sentences = [sentence for row in rows["train"] for sentence in row]
    tokenizer = load_tokenizer(request.tokenizer) if request.tokenizer else train_wordpiece(sentences)
    identity = tokenizer_identity(tokenizer) if request.tokenizer else None  # one made of train follows from the files
    if tokenizer.pad_token is None:  # GPT-2's, for one; the mask hides what stands there
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    pair = len(task.columns) == 2
    if request.sequence_length <= (special := tokenizer.num_special_tokens_to_add(pair)):
        raise ValueError(
            f"sequence_length={request.sequence_length} leaves no room for words beside {special} special tokens; "
            f"{folder.name} needs at least {special + 1}."
        )
    sets = {split: _tokenised(tokenizer, rows[split], labels[split], request.sequence_length) for split in SPLITS}
    seen = set(rows["train"])
    return Data(
        name=request.name,
        task="sequence-classification" if task.classes else "sequence-regression",
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        metric=task.metric,
        higher_is_better=True,
        chance=majority_accuracy(labels["train"], labels["test"]) if task.metric == "accuracy" else 0.0,
        num_classes=len(task.classes) if task.classes else 1,
        class_names=tuple(task.classes.values()) if task.classes else None,
        vocab_size=vocabulary_size(tokenizer),
        sequence_length=request.sequence_length,
        tokenizer=tokenizer,
        provenance={
            "source": request.argument,
            "licence": "mixed or unstated, see gluebenchmark.com",
            "counts": {split: len(rows[split]) for split in SPLITS},
            "also in train, word for word": {split: sum(row in seen for row in rows[split]) for split in SPLITS[1:]},
            "preprocessing": f"dev.tsv is test; validation held out of train.tsv, seed {request.seed}; "
            + (f"the tokenizer {request.tokenizer}" if request.tokenizer else "a WordPiece vocabulary trained on train")
            + (f"; {task.note}" if task.note else ""),
            "sha256": content_hash((folder / "train.tsv").read_bytes() + (folder / "dev.tsv").read_bytes(), identity),
        },
    )


def read_tsv(path: Path, task: Task) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Sentences (one or two per row) and labels, int64 classes or float32 scores [N], of one TSV file.

    ValueError for a missing file or column, or a row or label that the task's layout does not allow.
    """
    index = {written: i for i, written in enumerate(task.classes or ())}
    sentences, labels = [], []
    rows = read_columns(path, task, (*task.columns, task.label))
    for number, (*texts, label) in enumerate(rows, start=1 + task.header):
        try:
            labels.append(index[label] if task.classes else _finite(label))
        except (KeyError, ValueError):
            allowed = f"one of {', '.join(index)}" if task.classes else "a finite number"
            raise ValueError(f"Line {number} of {str(path)!r} has the label {label!r}; needed: {allowed}.") from None
        sentences.append(tuple(texts))
    return sentences, np.array(labels, dtype=np.int64 if task.classes else np.float32)


def read_columns(path: Path, task: Task, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """These columns of a task's TSV file, row by row; ValueError for a missing file or column, or a row of another
    number of columns."""
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist; a GLUE task is a folder with train.tsv and dev.tsv.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{str(path)!r} is not a UTF-8 file of tab-separated values ({error}).") from error
    header = lines.pop(0) if task.header and lines else [str(number) for number in range(4)]
    if missing := [column for column in columns if column not in header]:
        raise ValueError(
            f"{str(path)!r} has no column {missing[0]!r} in its first line, which is {', '.join(header)}; the "
            f"official layout of {path.parent.name} has {', '.join(columns)}."
        )
    if not lines:
        raise ValueError(f"{str(path)!r} has no rows.")
    for number, line in enumerate(lines, start=1 + task.header):
        if len(line) != len(header):
            raise ValueError(f"Line {number} of {str(path)!r} has {len(line)} columns where {len(header)} are needed.")
    places = [header.index(column) for column in columns]
    return [tuple(line[place] for place in places) for line in lines]


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def train_wordpiece(sentences: Sequence[str]) -> PreTrainedTokenizerFast:
    """A lower-case BERT tokenizer whose WordPiece vocabulary is trained on these; the same for the same sentences."""
    from tokenizers.implementations import BertWordPieceTokenizer
    from transformers import BertTokenizer

    trainer = BertWordPieceTokenizer()
    normalise = trainer.normalizer.normalize_str
    alphabet = sorted({character for sentence in sentences for character in normalise(sentence)} - {" "})
    trainer.train_from_iterator(
        iter(sentences),
        vocab_size=VOCAB_SIZE,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        # The trainer numbers continuations in the order of a hash map and breaks ties between pairs by number, which
        # differs from run to run; named in advance they are numbered in this order.
        special_tokens=[*SPECIAL_TOKENS, *(f"##{character}" for character in alphabet)],
        show_progress=False,
    )
    return BertTokenizer(vocab=trainer.get_vocab())


def _tokenised(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, ...]], labels: Tensor, sequence_length: int
) -> SentenceDataset:
    """The rows as token ids, the longer sentence of a pair cut first where they exceed `sequence_length`."""
    tokens = tokenizer(
        *(list(column) for column in zip(*rows, strict=True)),
        truncation=True,
        max_length=sequence_length,
        padding=True,
        padding_side="right",
        return_token_type_ids=True,
    )
    # numpy reads the lists several times faster than the tokenizer's own return_tensors
    input_ids, token_type_ids, mask = (
        torch.from_numpy(np.array(tokens[key])) for key in ("input_ids", "token_type_ids", "attention_mask")
    )
    return SentenceDataset(input_ids, token_type_ids, mask.sum(1), labels)
