"""One run on several processes: torchrun's and accelerate's environment, DDP and FSDP2, and agreement between them."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Parallel = Literal["ddp", "fsdp"]
MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # which accelerate reads
TIMEOUT = timedelta(minutes=10)  # how long the others are waited for


def start() -> Accelerator:
    """Join the processes that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, ...), or be alone.

    Raises:
        ValueError: some of them do not appear within `TIMEOUT`, or the environment does not say which process this is.
    """
    _check_environment()
    try:
        return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    except dist.DistError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Not all processes of this run appeared within {TIMEOUT} ({reason}).") from None


def _check_environment() -> None:
    """PyTorch's own four variables are enough; accelerate, without LOCAL_RANK, would take this process to be alone."""
    given = {name: os.environ[name] for name in ("WORLD_SIZE", "RANK", "MASTER_PORT") if os.environ.get(name)}
    for name, value in given.items():
        if not value.isdecimal():
            raise ValueError(f"{name} in the environment is {value!r}; it must be a whole number, 0 or more.")
    processes = int(given.get("WORLD_SIZE", 1))
    if processes == 1 or any(name in os.environ for name in MPI_RANKS):
        return
    if int(given.get("RANK", processes)) >= processes:
        raise ValueError(
            f"WORLD_SIZE in the environment is {processes} and RANK is {given.get('RANK', 'not set')}; give each "
            f"process one of 0 to {processes - 1}, or start them with torchrun."
        )
    os.environ.setdefault("LOCAL_RANK", str(int(given["RANK"]) % max(1, torch.cuda.device_count())))


@contextlib.contextmanager
def joined() -> Iterator[Accelerator]:
    """`start`, and at the end leave the others; a process that is lost meanwhile ends the run of all.

    Raises:
        ValueError: another process ended or cannot be reached any more.
    """
    try:
        yield start()
    except RuntimeError as error:
        gone = isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "onnection"))
        if process_count()[1] == 1 or not gone:
            raise
        raise ValueError(
            "Another process of this run ended or cannot be reached; start the same command again, and it goes on from "
            "the last checkpoint."
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def process_count() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def distribute(model: nn.Module, how: Parallel, device: torch.device) -> nn.Module:
    """The model on all processes: copies that average their gradients (ddp), or one in shards (fsdp, FSDP2).

    Sharded are the children of the layer list that holds the most parameters, one by one, and the rest as a whole. On a
    single process the model stays as it is. On GPUs, BatchNorm takes its statistics over all processes; PyTorch
    has no such BatchNorm for CPUs, where each process takes those of its own part of the batch.
    """
    model.to(device)
    if process_count()[1] == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if how == "ddp":
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        devices = [device] if device.type == "cuda" else None
        # some models have weights that a loss does not reach: a head that recovery does not train, official quirks
        return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # no block is changed in place
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    for layer in max(lists, key=_size, default=nn.ModuleList()):
        fully_shard(layer)
    fully_shard(model)  # in place
    return model


def whole(model: nn.Module) -> nn.Module:
    """The model inside the copy that `distribute` made."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: a sharded one's shard, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def synchronised(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients are exchanged in the backward pass of the `last` part of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gathered(value: Any) -> list[Any]:
    """What every process gave, in their order; of tensors and plain values, between the processes of one run."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """What the first process gave."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def follow_first(tensors: Iterable[Tensor]) -> None:
    """Give these tensors the values that they have on the first process, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def together(action: Callable[[], None], *, otherwise: str, first_only: bool = False) -> None:
    """Do something on every process, or on the first alone; if it fails on one, all raise a ValueError."""
    problem = None
    if not first_only or process_count()[0] == 0:
        try:
            action()
        except (OSError, SafetensorError, CheckpointException) as error:
            problem = _reason(error)
    problems = [p for p in gathered(problem) if p is not None]
    if problems:
        raise ValueError(f"{otherwise}: {problems[0]}.")


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        first = next(iter(error.failures.values()))
        return _reason(first[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
