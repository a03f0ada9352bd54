"""The training loop, for every task, on accelerate."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from formix.data import Batch, Data, collate
from formix.data.augmentation import augmented
from formix.data.draws import EpochSampler
from formix.training.acceleration import recompute_activations
from formix.training.config import TrainConfig
from formix.training.ema import Ema
from formix.training.optimizers import make_optimizer, set_learning_rate
from formix.training.tasks import Objective, task_objective

_log = logging.getLogger("formix")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation on the way."""

    step: int  # optimiser steps so far
    epoch: float  # passes over the training split so far
    seconds: float  # spent in training so far, evaluations left out
    train_loss: float  # mean since the evaluation before
    validation: float  # the objective's metric


@dataclass(kw_only=True)
class TrainResult:
    """What became of a training run."""

    curve: list[Point] = field(default_factory=list)
    seconds: float = 0.0  # training alone, without evaluations
    samples: int = 0  # that went through the model
    diverged: str | None = None  # the sentence that says when the loss was no number any more

    @property
    def validation(self) -> float | None:
        """The metric at the end."""
        return self.curve[-1].validation if self.curve and not self.diverged else None


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What to compute in, None for the weights' own float32; "auto": bfloat16 where the hardware multiplies it."""
    if precision == "auto":
        if torch.cuda.is_available():
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else None
    return None if precision == "float32" else getattr(torch, precision)


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    objective: Objective | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> TrainResult:
    """Train `model` in place; with `ema`, its weights are at the end the moving average, which is what is evaluated.

    The order of batches and their augmentation depend on the seed alone, so models compared under one seed see the same
    batches. On the CPU the same seed twice gives the same weights to the last bit (with a budget in epochs).

    Args:
        objective: the loss of a batch and the metric of the curve; None: those of the data's task.
        on_progress: called after every step with the share of the budget that is spent.

    Returns:
        The learning curve; a loss that is no finite number ends the run and is said in `diverged`.
    """
    objective = objective or task_objective(data, config.label_smoothing, config.loss)
    set_seed(config.seed)
    accelerator = Accelerator(gradient_accumulation_steps=config.accumulation)
    half = autocast_dtype(config.precision)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=half == torch.float16)
    training = augmented(data, config.augmentation, config.seed).train
    loader = DataLoader(
        training,
        batch_size=max(1, config.batch_size // config.accumulation),
        sampler=EpochSampler(training, config.seed),
        collate_fn=collate,
    )
    if config.activation_checkpointing:
        recompute_activations(model)
    if config.compile:
        model.compile()
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model, config), loader)
    bare = accelerator.unwrap_model(model)
    ema = Ema(bare, config.ema) if config.ema else None
    steps_per_epoch = math.ceil(len(loader) / config.accumulation)
    total = math.inf if config.epochs is None else max(1, round(config.epochs * steps_per_epoch))
    clock = _Clock()
    result = TrainResult()
    losses: list[torch.Tensor] = []
    step, due = 0, 1
    model.train()
    for batch in _forever(loader):
        progress = _progress(step, total, clock.seconds, config)
        factor = config.lr_factor(progress if config.seconds else (step + 0.5) / total)
        set_learning_rate(optimizer, config.lr * factor)
        with accelerator.accumulate(model):
            with torch.autocast(accelerator.device.type, half, enabled=half is not None):
                loss = objective.loss(model, batch)
            accelerator.backward(scaler.scale(loss))
            if accelerator.sync_gradients:
                scaler.unscale_(optimizer)
                if config.clip:
                    accelerator.clip_grad_norm_(model.parameters(), config.clip)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        losses.append(loss.detach())
        result.samples += batch["labels"].shape[0]
        if not accelerator.sync_gradients:
            continue
        step += 1
        if ema is not None:
            ema.update(bare)
        progress = _progress(step, total, clock.seconds, config)
        if on_progress is not None:
            on_progress(min(1.0, progress))
        if not math.isfinite(loss.item()):
            result.diverged = f"the loss became {loss.item()} at step {step} with learning rate {config.lr:g}"
            break
        if progress >= due / config.evaluations or progress >= 1:
            clock.pause()
            mean = torch.stack(losses).mean().item()
            with ema.applied(bare) if ema is not None else contextlib.nullcontext():
                metric = objective.metric(model)
            seconds, epoch = clock.seconds, step / steps_per_epoch
            result.curve.append(Point(step=step, epoch=epoch, seconds=seconds, train_loss=mean, validation=metric))
            losses.clear()
            due = math.floor(progress * config.evaluations) + 1
            clock.resume()
        if progress >= 1:
            break
    clock.pause()
    if ema is not None:
        ema.copy_to(bare)
    result.seconds = clock.seconds
    return result


class _Clock:
    """Seconds of training: it stands still during evaluations."""

    def __init__(self) -> None:
        self._spent, self._since = 0.0, time.perf_counter()
        self._running = True

    @property
    def seconds(self) -> float:
        return self._spent + (time.perf_counter() - self._since if self._running else 0.0)

    def pause(self) -> None:
        self._spent, self._running = self.seconds, False

    def resume(self) -> None:
        self._since, self._running = time.perf_counter(), True


def _progress(step: int, total: float, seconds: float, config: TrainConfig) -> float:
    return step / total if config.seconds is None else seconds / config.seconds


def _forever(loader: Any) -> Iterator[Batch]:
    while True:
        yield from loader
