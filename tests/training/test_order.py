"""Batches out of other processes: what goes wrong there is said in one sentence here."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from formix.data import BatchDataset
from formix.training.order import BatchOrder, naming_killed_workers


class Numbers(BatchDataset):
    """Its own indices; of one of them something else happens than reading it."""

    def __init__(self, at, action):
        self.at, self.action = at, action

    def __len__(self):
        return 12

    def __getitems__(self, indices):
        if self.at in indices:
            self.action()
        return {"labels": torch.tensor(indices)}


def unreadable():
    raise ValueError("The image 'x.png' cannot be read (it is no image); repair or remove it.")


def batches(action, workers=1):
    dataset = Numbers(5, action)
    order = BatchOrder(dataset, batch_size=4, accumulation=1, seed=0, process=0, processes=1)
    read = order.batches(0, 0, workers=workers)
    return torch.cat([next(read)["labels"] for _ in range(order.steps_per_epoch)])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named_in_the_same_sentence(workers):
    with pytest.raises(
        ValueError, match=r"^The image 'x\.png' cannot be read \(it is no image\); repair or remove it\.$"
    ):
        batches(unreadable, workers)


KILLED = r"loads data \(one of `workers`\) was killed.*start the same command again"


def test_a_process_that_is_killed_ends_the_run_in_one_sentence():
    with pytest.raises(ValueError, match=KILLED), naming_killed_workers():
        batches(lambda: os.kill(os.getpid(), signal.SIGKILL))


def under_way():
    """Batches, of which one was read, and the process that loads them."""
    order = BatchOrder(Numbers(None, None), batch_size=4, accumulation=1, seed=0, process=0, processes=1)
    others = set(multiprocessing.active_children())
    read = order.batches(0, 0, workers=1)
    next(read)
    (worker,) = set(multiprocessing.active_children()) - others
    return read, worker


def test_a_process_that_is_killed_while_the_model_is_at_work_ends_the_run_in_the_same_sentence():
    _, worker = under_way()

    def work():
        worker.kill()
        time.sleep(30)  # which the signal's handler ends

    with pytest.raises(ValueError, match=KILLED), naming_killed_workers():
        work()


def test_a_signal_to_all_processes_leaves_those_that_load_data_to_the_one_that_saves():
    read = batches(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert sorted(read.tolist()) == list(range(12))


def test_a_signal_of_the_process_that_ends_ends_those_that_load_data():
    """multiprocessing sends it at exit and then waits for them without a limit."""
    _, worker = under_way()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0
