"""Images that cannot be read and are to be left out: found when the data are opened, not when a batch is made.

So the samples of every split are known before the first step: the batches are the same for all processes and whenever
a run goes on, and every figure divides by the right number. The price is that all images are read once more.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from formix.data.encoded import EncodedImage

_log = logging.getLogger("formix")
MOST = 0.1  # share of a split that may be left out
CHUNK = 1024  # images under way at a time
NAMED = 3  # files that the warning names


def readable(images: Iterable[EncodedImage]) -> Iterator[bool]:
    """Whether each image can be decoded; any number of them."""
    images = iter(images)
    with ThreadPoolExecutor() as pool:  # PIL releases the interpreter's lock
        while chunk := list(islice(images, CHUNK)):
            yield from pool.map(lambda image: image.readable(), chunk)


def refuse_loss(
    name: str, split: str, skipped: Sequence[tuple[str, int]], kept: Counter[int], class_names: Sequence[str]
) -> None:
    """ValueError if more than a tenth of a split, or a whole class of train, would be left out.

    Args:
        skipped: the file and the class of each image that cannot be read.
        kept: how many of each class can be.
    """
    total = len(skipped) + kept.total()
    if len(skipped) > MOST * total:
        raise ValueError(
            f"Of the {total} images for {split} in {name!r}, {len(skipped)} cannot be read, such as {skipped[0][0]!r}; "
            f"at most {MOST:.0%} are skipped, so repair the data."
        )
    lost = sorted({label for _, label in skipped} - kept.keys())
    if lost and split == "train":
        raise ValueError(
            f"No image for training of the class {class_names[lost[0]]!r} in {name!r} can be read; repair the data."
        )


def count_skipped(name: str, skipped: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How many files of each split are left out, which is also said in a warning that names the first."""
    everything = [file for files in skipped.values() for file in files]
    if everything and os.environ.get("RANK", "0") == "0":  # of several processes, one says it
        first = ", ".join(map(repr, everything[:NAMED])) + (", ..." if len(everything) > NAMED else "")
        by_split = ", ".join(f"{len(files)} of {split}" for split, files in skipped.items() if files)
        _log.warning("images of %r that cannot be read are left out, %s: %s", name, by_split, first)
    return {split: len(files) for split, files in skipped.items()}
