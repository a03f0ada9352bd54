"""What every data source returns: three splits of ready batches, the metric to report, and where it all came from."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_log = logging.getLogger("formix")
Batch = dict[str, Tensor]
Task = Literal["image-classification", "causal-lm", "masked-lm", "sequence-classification", "sequence-regression"]
Metric = Literal["accuracy", "bits_per_byte", "perplexity", "matthews_corrcoef", "spearman"]
OnBadSample = Literal["refuse", "skip"]
SPLITS = ("train", "validation", "test")
# what folders, files and tables call them
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


class BatchDataset(Dataset[Batch]):
    """A map-style dataset that makes a whole batch at once.

    A DataLoader calls `__getitems__` with the indices of a batch, so there is no work per sample; pass `collate` as its
    `collate_fn`. `dataset[i]` is the same thing for one sample, without the batch dimension.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these samples; every tensor begins with the batch dimension B = len(indices)."""

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return {key: value[0] for key, value in self.__getitems__([index % len(self)]).items()}

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))


def collate(batch: Batch | list[Batch]) -> Batch:
    """The `collate_fn` for a DataLoader on these datasets: a ready batch passes through, single samples are stacked."""
    return batch if isinstance(batch, dict) else default_collate(batch)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data for one task, as `load_data` returns it.

    Batches carry transformers' names. Images: `pixel_values` float32 [B, C, H, W], normalised, and `labels` int64 [B].
    Language modelling: `input_ids` and `labels` int64 [B, T], where `labels` are the next tokens, already shifted;
    masked, the tokens themselves where they are to be predicted and -100 elsewhere.
    Sentences: `input_ids`, `attention_mask`, `token_type_ids` int64 [B, T], padded to the longest of the batch, and
    `labels`, int64 [B] for classes or float32 [B] for scores.
    """

    name: str  # as the user gave it: "digits", "folder:pictures", "glue:GLUE/SST-2"
    task: Task
    train: BatchDataset
    validation: BatchDataset  # for choosing (learning rate, epoch); never reported
    test: BatchDataset  # for reporting; never chosen on
    metric: Metric  # what is reported
    higher_is_better: bool
    chance: float  # the metric on test of the best prediction, learned from train, that does not look at its input
    num_classes: int | None = None  # 1 for regression, None for language modelling
    class_names: tuple[str, ...] | None = None
    in_chans: int | None = None
    img_size: tuple[int, int] | None = None  # height, width
    vocab_size: int | None = None
    sequence_length: int | None = None  # targets per window, or the most tokens of a sentence
    tokenizer: PreTrainedTokenizerFast | None = None  # None: the tokens are bytes, or there are no tokens
    baselines: dict[str, float] = field(default_factory=dict)  # simple models: their metric on the test targets
    bytes_per_target: dict[str, float] | None = None  # per split; bits per byte = nats per target / ln 2 / this
    provenance: dict[str, Any] = field(default_factory=dict)  # JSON: source, counts, licence, sha256, preprocessing


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `load_data` was asked for; its words, checked."""

    name: str
    sequence_length: int
    tokenizer: str | None
    img_size: int | None
    validation_fraction: float | None  # None: the source's own default
    test_fraction: float | None
    seed: int
    limit: int | None
    on_bad_sample: OnBadSample
    labelled: bool

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length={self.sequence_length} must be at least 1.")
        if self.img_size is not None and not 1 <= self.img_size <= 4096:
            raise ValueError(f"img_size={self.img_size} must be between 1 and 4096.")
        for option in ("validation_fraction", "test_fraction"):
            if (fraction := getattr(self, option)) is not None and not 0 < fraction < 1:
                raise ValueError(f"{option}={fraction} must lie between 0 and 1, both excluded.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be between 0 and {2**32 - 1}.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1, or left out to keep all training samples.")
        if self.on_bad_sample not in get_args(OnBadSample):
            raise ValueError(f"on_bad_sample={self.on_bad_sample!r} must be 'refuse' or 'skip'.")

    @property
    def argument(self) -> str:
        """What follows the colon of the name: a path, or a name elsewhere."""
        return self.name.partition(":")[2]

    def fractions(self, *, validation: float = 0.1, test: float = 0.1) -> tuple[float, float]:
        """The fractions asked for, or these defaults."""
        validation = validation if self.validation_fraction is None else self.validation_fraction
        test = test if self.test_fraction is None else self.test_fraction
        if validation + test >= 1:
            raise ValueError(
                f"validation_fraction={validation:g} and test_fraction={test:g} leave nothing to train on; "
                "their sum must be below 1."
            )
        return validation, test

    def divide(
        self,
        count: int,
        labels: np.ndarray | None,
        absent: Sequence[str],
        *,
        classes: Sequence[str] | None = None,
        validation: float = 0.1,
        test: float = 0.1,
    ) -> dict[str, np.ndarray]:
        """Rows of `count` training samples for train and each `absent` split: disjoint, sorted, train cut to `limit`.

        Stratified if there are labels [count]; the fractions are the defaults, of all `count`. Raises ValueError where
        a class, called by its name in `classes`, has too few samples for every part.
        """
        validation, test = self.fractions(validation=validation, test=test)
        rows = {"train": np.arange(count)}
        if "test" in absent:
            rows["train"], rows["test"] = self._hold_out(rows["train"], labels, test, classes)
            validation /= 1 - test
        if "validation" in absent:
            rows["train"], rows["validation"] = self._hold_out(rows["train"], labels, validation, classes)
        if self.limit is not None and self.limit < len(rows["train"]):  # a smaller limit takes a subset
            order = np.random.default_rng(self.seed).permutation(len(rows["train"]))
            rows["train"] = rows["train"][np.sort(order[: self.limit])]
        return rows

    def _hold_out(
        self, rows: np.ndarray, labels: np.ndarray | None, fraction: float, classes: Sequence[str] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.model_selection import train_test_split

        strata = None if labels is None else labels[rows]
        values, sizes = np.unique(np.zeros(len(rows), int) if strata is None else strata, return_counts=True)
        if sizes.min(initial=len(rows)) < 2:
            rare = None if classes is None else classes[values[sizes.argmin()]]
            raise ValueError(
                f"{self.name!r} has {'a class' if rare is None else f'the class {rare!r}'} with too few samples to "
                f"divide ({sizes.min(initial=len(rows))} left): it takes 2 of each class to hold out one split and 3 "
                "for two; add samples or remove the class."
            )
        held = min(max(round(fraction * len(rows)), len(sizes)), len(rows) - len(sizes))  # some of each class in both
        kept, out = train_test_split(rows, test_size=held, stratify=strata, random_state=self.seed)
        return np.sort(kept), np.sort(out)


def split_of(folder: str) -> str | None:
    """The split that a folder's name says, in capitals or not; None for any other name."""
    return next((split for split, words in SPLIT_WORDS.items() if folder.lower() in words), None)


def pass_over(place: object, files: Sequence[PurePath], what: str, more: str = "") -> None:
    """Say that files are no part of the data, how many there are and what kind; of several processes, one says it."""
    if files and os.environ.get("RANK", "0") == "0":
        _log.warning("passed over in %s: %d %s, such as %s%s", place, len(files), what, min(files), more)


def majority_accuracy(train_labels: Tensor, test_labels: Tensor) -> float:
    """Accuracy on test of always answering the most frequent class of train."""
    return (test_labels == torch.bincount(train_labels).argmax()).double().mean().item()
