"""The settings that say which data a run reads: for comparisons and training alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from formix.data import Data, OnBadSample, load_data
from formix.data.masking import masked_lm


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The arguments of `formix.data.load_data`, and what the data are read for."""

    data: str = "digits"  # a name of `formix data`
    task: Literal["masked-lm"] | None = None  # None: what the data are for
    mask_probability: float = 0.15  # of masked-lm: share of the tokens that are to be predicted
    sequence_length: int = 128  # tokens of a window or sentence
    tokenizer: str | None = None  # a transformers tokenizer directory; None: bytes, or WordPiece of the data for GLUE
    img_size: int | None = None  # side that images of folders are scaled to
    validation_fraction: float | None = None  # held out for choosing; None: the data's own default
    test_fraction: float | None = None  # held out for reporting where the data have no test split
    limit: int | None = None  # most training samples (bytes of text)
    on_bad_sample: OnBadSample = "refuse"  # of images in files: one that cannot be read ends the run, or is left out

    @property
    def contents(self) -> str:
        """What `provenance["sha256"]` is of, in words."""
        return "data" if self.tokenizer is None else "data and tokenizer"

    def load_data(self) -> Data:
        """The data of the run.

        Raises:
            ValueError: another task, a share of masked tokens without one, or what `load_data` and `masked_lm` refuse.
        """
        if self.task not in (None, "masked-lm"):
            raise ValueError(f"task is {self.task!r}; it must be 'masked-lm', or left out for what the data are for.")
        if self.task is None and self.mask_probability != 0.15:
            raise ValueError(f"mask_probability is {self.mask_probability}, which is of task='masked-lm'; give both.")
        data = load_data(
            self.data,
            sequence_length=self.sequence_length,
            tokenizer=self.tokenizer,
            img_size=self.img_size,
            validation_fraction=self.validation_fraction,
            test_fraction=self.test_fraction,
            limit=self.limit,
            on_bad_sample=self.on_bad_sample,
        )
        return masked_lm(data, probability=self.mask_probability) if self.task == "masked-lm" else data
