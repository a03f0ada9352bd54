import random

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from formix.data.draws import DrawnDataset, epoch_order, own_randomness, seed_all


class Numbers(DrawnDataset):
    def __init__(self, size, repeats=1):
        self.size, self.repeats, self.seed = size, repeats, 0

    def __len__(self):
        return self.size

    def __getitems__(self, indices):
        return {"draws": torch.tensor(self.draws(indices))}


def test_an_epoch_draws_every_sample_once_and_another_epoch_in_another_order():
    numbers = Numbers(10)
    first, second = (numbers.__getitems__(epoch_order(numbers, epoch, 3).tolist())["draws"] for epoch in (0, 1))
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == list(range(10))
    assert first[:, 0].tolist() != second[:, 0].tolist()
    assert set(first[:, 1].tolist()) == {0}
    assert set(second[:, 1].tolist()) == {1}


def test_samples_are_counted_from_the_end_too():
    assert Numbers(10)[-1]["draws"].tolist() == Numbers(10)[9]["draws"].tolist() == [9, 0]


def test_the_order_depends_on_seed_and_epoch_alone():
    numbers = Numbers(20)
    assert torch.equal(epoch_order(numbers, 2, 5), epoch_order(numbers, 2, 5))
    assert not torch.equal(epoch_order(numbers, 0, 5) % 20, epoch_order(numbers, 0, 6) % 20)


def test_repeats_stand_together_as_in_timm_and_are_different_draws():
    numbers = Numbers(12, repeats=3)
    draws = numbers.__getitems__(epoch_order(numbers, 4, 0).tolist())["draws"]
    samples = draws[:, 0].tolist()
    assert samples == [sample for sample in samples[::3] for _ in range(3)]
    assert draws[:, 1].tolist() == [12, 13, 14] * 4
    timm = list(RepeatAugSampler(numbers, num_replicas=1, rank=0, num_repeats=3, selected_round=0))
    first = {sample: place for place, sample in reversed(list(enumerate(timm)))}
    assert [first[s] for s in timm] == [place // 3 * 3 for place in range(12)]
    assert len(timm) == len(samples)


def test_own_randomness_leaves_the_generators_as_they_were():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_all(1, 2)
    expected = draw()
    seed_all(1, 2)
    with own_randomness():
        seed_all(3)
        draw()
    assert draw() == expected
