"""How much memory a training step takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from formix.data import Batch, Data
from formix.training.acceleration import autocast_dtype
from formix.training.tasks import forward, loss_of


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages alive after every operation and keeps the largest sum, `peak` in bytes."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._see(tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._see([t for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        return out

    def _see(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            self._live[reference.cdata] = (reference, storage.nbytes())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))


def peak_step_memory(
    model: nn.Module,
    data: Data,
    batch: Batch,
    precision: str = "float32",
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
) -> int:
    """Bytes of tensors alive at the worst moment of one step on `batch`: weights, gradients, optimiser state (AdamW's,
    unless `make_optimizer` makes another) and activations. Counted from the tensors themselves, so that it does not
    depend on what else the process holds; scratch memory inside an operation is not seen."""
    device = next(model.parameters()).device
    others = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    model = copy.deepcopy(model).train()
    batch = {k: v.to(device) for k, v in batch.items()}
    optimizer = make_optimizer(model) if make_optimizer else torch.optim.AdamW(model.parameters(), fused=True)
    half = autocast_dtype(precision)

    def step() -> None:
        with torch.autocast(device.type, half, enabled=half is not None):
            logits = forward(model, batch)
        loss_of(logits, batch["labels"], data).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimiser's state exists from here on
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - others
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    with _LiveTensors([*model.parameters(), *model.buffers(), *states]) as live:
        step()
    return live.peak
