"""Which samples make which optimiser step, for one process or several."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from formix.data import Batch, BatchDataset, collate
from formix.data.draws import epoch_order


class BatchOrder:
    """The batches of a run: a function of the seed, the epoch and the place in it, and of nothing else.

    Step i of an epoch reads samples iB ... iB + B - 1 of `epoch_order`, on any number P of processes: process r has
    every P-th of them from the r-th on, in `accumulation` parts. A part's mean loss counts by its share of the step's
    samples, so that the gradient, averaged over the processes, is that of the mean over all of them; the last step of
    an epoch may have fewer.
    """

    def __init__(
        self, dataset: BatchDataset, *, batch_size: int, accumulation: int, seed: int, process: int, processes: int
    ) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.process, self.processes = process, processes
        self.part_size = math.ceil(math.ceil(batch_size / processes) / accumulation)
        self.steps_per_epoch = math.ceil(len(dataset) / batch_size)

    def samples(self, step: int) -> int:
        """How many samples step `step` of an epoch has, over all processes."""
        return min(self.batch_size, len(self.dataset) - step * self.batch_size)

    def weights(self, step: int) -> list[float]:
        """What the mean losses of this process's parts are multiplied with; 0 where a part has no samples."""
        samples = self.samples(step)
        return [len(part) * self.processes / samples for part in self._parts(range(samples))]

    def loader(self, epoch: int, step: int, *, workers: int = 0) -> DataLoader[Batch]:
        """This process's parts from there on, without end."""
        return DataLoader(
            self.dataset,
            batch_sampler=_Endless(self, epoch, step),
            collate_fn=collate,
            num_workers=workers,
            worker_init_fn=_outlive_sigterm,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # the loader's own draws leave the global state alone
        )

    def batches(self, epoch: int, step: int, *, workers: int = 0) -> Iterator[Batch]:
        """What `loader` reads.

        Raises:
            ValueError: what a process that loads data raised, in its words, or that such a process does not answer.
        """
        loader = iter(self.loader(epoch, step, workers=workers))
        while True:
            try:
                batch = next(loader)
            except ValueError as error:  # PyTorch puts the worker's traceback before them
                raise ValueError(str(error).rpartition("\nValueError: ")[2]) from error
            except (ConnectionError, EOFError) as error:
                if workers == 0:
                    raise
                raise _killed() from error
            yield batch

    def walk(self, epoch: int, step: int) -> Iterator[list[int]]:
        """The indices of the parts that `loader` reads."""
        for number in itertools.count(epoch):
            order = epoch_order(self.dataset, number, self.seed).tolist()
            for place in range(step if number == epoch else 0, self.steps_per_epoch):
                whole = order[place * self.batch_size : (place + 1) * self.batch_size]
                for part in self._parts(whole):
                    yield part or whole[:1]  # a process without samples computes one with weight 0: others wait for it

    def _parts(self, samples: Any) -> list[Any]:
        mine, most = samples[self.process :: self.processes], math.ceil(len(samples) / self.processes)
        return [mine[start : start + self.part_size] for start in range(0, most, self.part_size)]


def _outlive_sigterm(worker: int) -> None:
    """A signal to all processes of a run (Slurm's, systemd's) is for the one that saves, which still needs batches; one
    from that process itself, which ends, is for this one. macOS cannot tell them apart, and PyTorch's handler stays."""
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextlib.contextmanager
def naming_killed_workers() -> Iterator[None]:
    """Say by `ValueError` that a process that loads data was killed: PyTorch raises it in a signal's handler, wherever
    the training process is at that moment, mostly inside the model."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise _killed() from error


def _killed() -> ValueError:
    return ValueError(
        "A process that loads data (one of `workers`) was killed, perhaps because memory ran out; start the same "
        "command again, with fewer workers if it happens again."
    )


class _Endless:
    def __init__(self, order: BatchOrder, epoch: int, step: int) -> None:
        self.order, self.epoch, self.step = order, epoch, step

    def __iter__(self) -> Iterator[list[int]]:
        return self.order.walk(self.epoch, self.step)
