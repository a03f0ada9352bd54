"""What a comparison measures of every design besides its accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from formix.benchmarks import interleaved_medians
from formix.benchmarks.latency import interleaved_times
from formix.data import Batch, Data
from formix.training import TrainConfig, forward, peak_step_memory
from formix.training.one_step import one_step
from formix.training.plan import flops_per_sample

LATENCY_BATCHES = (1, 32)
LATENCY_DTYPES = (torch.float32, torch.bfloat16)
SECONDS = 2.0  # for the training steps of two designs


def sample_batch(data: Data, size: int, *, longest: bool = False) -> Batch:
    """`size` training samples, again from the beginning where there are fewer: the first ones or, of sentences, those
    whose length is nearest to the mean, or the longest."""
    lengths = getattr(data.train, "lengths", None)
    order: Sequence[int] = range(len(data.train))
    if lengths is not None:
        order = (-lengths if longest else (lengths - lengths.double().mean()).abs()).argsort(stable=True).tolist()
    return data.train.__getitems__([order[i % len(order)] for i in range(size)])


def flops_per_item(model: nn.Module, data: Data) -> int:
    """Forward operations for one image or one sequence."""
    return flops_per_sample(model, sample_batch(data, 1))


def step_memory(model: nn.Module, data: Data, batch_size: int, precision: str) -> int:
    """Bytes alive at the worst moment of a training step."""
    size = min(batch_size, len(data.train))
    return peak_step_memory(model, data, sample_batch(data, size, longest=True), precision)


def latencies(models: dict[str, nn.Module], data: Data) -> dict[str, dict[str, dict[str, float | None]]]:
    """Milliseconds of a forward pass: design -> dtype -> batch size; the designs are timed in turn.

    The models run as a user would run them, on the device that they are on: evaluation mode, no gradients, weights and
    inputs in the dtype.
    """
    result: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in models}
    device = next(next(iter(models.values())).parameters()).device
    for dtype in LATENCY_DTYPES:
        typed = {name: model.eval().to(dtype) for name, model in models.items()}
        for size in LATENCY_BATCHES:
            batch = {
                k: v.to(device, dtype if v.is_floating_point() else None) for k, v in sample_batch(data, size).items()
            }
            calls = {name: _call(model, batch) for name, model in typed.items()}
            for name, seconds in interleaved_medians(calls).items():
                result[name].setdefault(str(dtype).removeprefix("torch."), {})[str(size)] = 1e3 * seconds
    return result


def training_speeds(build: Mapping[str, Callable[[], nn.Module]], data: Data, config: TrainConfig) -> dict[str, float]:
    """Samples per second of training steps: design -> number.

    Each design takes steps in turn with the first one, so that there are never more than two models and their
    optimisers, and has the first one's speed times the median of the quotients of neighbouring steps.
    """
    first, *others = build
    times: list[float] = []
    faster = {first: 1.0}
    for name in others or [first]:
        steps = {design: one_step(build[design](), data, config) for design in dict.fromkeys((first, name))}
        calls = {design: step.take for design, step in steps.items()}
        found = interleaved_times(calls, repeats=100, seconds=SECONDS)
        times += found[first]
        faster[name] = statistics.median(a / b for a, b in zip(found[first], found[name], strict=True))
    speed = steps[first].samples / statistics.median(times)
    return {name: speed * faster[name] for name in build}


def _call(model: Any, batch: Batch) -> Callable[[], object]:
    @torch.inference_mode()
    def call() -> object:
        return forward(model, batch)

    return call
