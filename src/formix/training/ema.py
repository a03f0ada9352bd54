"""An exponential moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from formix.training.parallel import local


class Ema:
    """e <- d_n e + (1 - d_n) w after every step n = 1, 2, ..., with d_n = min(decay, n / (n + 9)).

    The rising decay is TensorFlow's `ExponentialMovingAverage(num_updates)`: early averages forget the random weights,
    and runs much shorter than 1 / (1 - decay) steps still have a meaningful one; at DeiT's 375,000 steps and
    decay 0.99996 it has long been without effect. Floating-point buffers (BatchNorm's statistics) are averaged too,
    others copied. Sharded parameters (FSDP2's DTensors) are averaged shard by shard, without communication.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema is {decay}; a decay lies between 0 and 1, both excluded.")
        self.decay, self.steps = decay, 0
        self.weights = {name: tensor.detach().clone() for name, tensor in _averaged(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))
        mine: list[Tensor] = []
        theirs: list[Tensor] = []
        for name, tensor in _averaged(model):
            if tensor.is_floating_point():
                mine.append(local(self.weights[name]))
                theirs.append(local(tensor))
            else:
                self.weights[name].copy_(tensor)
        torch._foreach_lerp_(mine, theirs, 1 - decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again afterwards, to the last bit."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give the model the averaged weights for good."""
        for name, tensor in _averaged(model):
            local(tensor).copy_(local(self.weights[name]))

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, tensor in _averaged(model):
            own, average = local(tensor), local(self.weights[name])
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)


def _averaged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and every buffer that is saved, once each however often it is used."""
    saved = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in saved.items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
