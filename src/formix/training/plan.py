"""What a run will take, before it is started: parameters, operations, memory, time."""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import dataclass

import torch
from torch import nn

from formix.benchmarks import count_flops
from formix.benchmarks.latency import interleaved_times
from formix.data import Batch, Data
from formix.training.acceleration import recompute_activations
from formix.training.config import TrainConfig
from formix.training.ema import Ema
from formix.training.memory import peak_step_memory
from formix.training.one_step import one_step
from formix.training.optimizers import make_optimizer
from formix.training.tasks import MODEL_INPUTS

TIMED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The figures of one run on one process."""

    parameters: int
    trainable: int  # of the parameters
    flops_per_sample: int  # of a forward pass; an image or a sequence
    flops: float | None  # of the whole run: three times the forward pass for every sample; None: a budget in seconds
    steps: int | None  # of the optimiser; None: a budget in seconds
    memory: int  # bytes of tensors at the worst moment of a step, optimiser's state and averaged weights included
    seconds_per_step: float  # median of a few steps on this machine as it is, data included
    samples_per_second: float
    seconds: float  # of the whole run, without evaluations

    def __str__(self) -> str:
        steps = "as many steps as fit" if self.steps is None else f"{self.steps:,} steps"
        run = "" if self.flops is None else f", {_short(self.flops)} FLOPs in the whole run"
        return "\n".join(
            [
                f"parameters   {self.parameters:,}"
                + (f", {self.trainable:,} of them trained" if self.trainable != self.parameters else ""),
                f"operations   {_short(self.flops_per_sample)} FLOPs forward per sample{run}",
                f"memory       {self.memory / 2**20:,.0f} MiB of tensors at the worst moment of a step",
                f"speed        {1e3 * self.seconds_per_step:,.0f} ms per step, "
                f"{self.samples_per_second:,.1f} samples/s, measured on {TIMED_STEPS} steps",
                f"time         {_duration(self.seconds)} for {steps}, evaluations not counted",
            ]
        )


def plan(model: nn.Module, data: Data, config: TrainConfig, device: torch.device | str | None = None) -> Plan:
    """Measure a few steps on a copy of `model` and reckon what the whole run takes; the model is left alone.

    Args:
        device: where the run will be; None: where the model is.
    """
    probe = copy.deepcopy(model).to(device).train()
    if config.activation_checkpointing:
        recompute_activations(probe)
    step, size = one_step(probe, data, config), len(data.train)
    times = interleaved_times({"step": step.take}, repeats=TIMED_STEPS, seconds=math.inf, warm_up=1)["step"]
    part_seconds = statistics.median(times)
    flops = flops_per_sample(model, step.batch)
    memory = peak_step_memory(probe, data, step.batch, config.precision, lambda copied: make_optimizer(copied, config))
    if config.ema:
        memory += sum(tensor.nbytes for tensor in Ema(probe, config.ema).weights.values())
    steps = None
    if config.epochs is not None:
        steps = max(1, round(config.epochs * math.ceil(size / config.batch_size)))
    return Plan(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        flops_per_sample=flops,
        flops=None if config.epochs is None else 3.0 * flops * config.epochs * size,
        steps=steps,
        memory=memory,
        seconds_per_step=part_seconds * min(config.batch_size, size) / step.samples,
        samples_per_second=step.samples / part_seconds,
        seconds=config.seconds if config.epochs is None else config.epochs * size * part_seconds / step.samples,  # type: ignore[arg-type]
    )


def flops_per_sample(model: nn.Module, batch: Batch) -> int:
    """Operations of a forward pass on the first sample of a batch, an image or a sequence."""
    one = {name: tensor[:1] for name, tensor in batch.items()}
    if "pixel_values" in one:
        return count_flops(model, one["pixel_values"])
    return count_flops(model, {name: one[name] for name in MODEL_INPUTS if name in one})


def _short(number: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f} "


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
