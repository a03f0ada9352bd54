"""Samples that differ every time they are drawn, and are the same again whenever a run is repeated or resumed.

No generator is carried from batch to batch: the randomness of a sample derives from a seed, the sample's index and how
often it was drawn before. So there is no state to save, and neither the number of processes or workers nor the place
where a run was interrupted changes what a sample looks like.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from formix.data.base import BatchDataset


class DrawnDataset(BatchDataset):
    """A dataset of N samples in which index i + d N, for any d >= 0, is the d-th draw of sample i."""

    seed: int
    repeats: int = 1  # draws of a sample that follow one another in an epoch (repeated augmentation)

    def draws(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """(sample, number of the draw) of every index."""
        size = len(self)
        return [(index % size, index // size) for index in indices]


def epoch_order(dataset: BatchDataset, epoch: int, seed: int) -> Tensor:
    """The indices int64 [N] of one epoch over `dataset`, shuffled by the seed and the epoch alone.

    With `repeats` R of a `DrawnDataset`, each of the first N / R samples of the permutation stands R times in a row,
    as R different draws: the repeated augmentation of Hoffer et al. (arXiv 1901.09335), in the order of DeiT's code,
    where processes that take turns get different draws of the same image.
    """
    size = len(dataset)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(_hash(seed, epoch)))
    if not isinstance(dataset, DrawnDataset):
        return order
    place = torch.arange(size)
    draw = epoch * dataset.repeats + place % dataset.repeats
    return order[place // dataset.repeats] + draw * size


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Python's, NumPy's and PyTorch's CPU generators are afterwards what they were before, whatever happens inside."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_all(*key: int) -> None:
    """Seed these generators with numbers that depend on the key alone; for use inside `own_randomness`."""
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])


def _hash(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
