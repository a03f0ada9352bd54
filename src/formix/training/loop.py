"""The training loop, for every task, on accelerate."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader

from formix.data import Batch, Data, collate
from formix.training.config import TrainConfig
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


def uses_bfloat16(precision: str) -> bool:
    """Whether to train under bfloat16 autocast; "auto" does where the hardware multiplies bfloat16 numbers."""
    if precision == "auto":
        if torch.cuda.is_available():
            return torch.cuda.is_bf16_supported()
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return precision == "bfloat16"


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    objective: Objective | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> TrainResult:
    """Train `model` in place with AdamW, linear warm-up and cosine decay.

    The order of batches depends on the seed alone, so models compared under one seed see the same batches. On the CPU
    the same seed twice gives the same weights to the last bit (with a budget in epochs).

    Args:
        objective: the loss of a batch and the metric of the curve; None: those of the data's task.
        on_progress: called after every step with the share of the budget that is spent.

    Returns:
        The learning curve; a loss that is no finite number ends the run and is said in `diverged`.
    """
    objective = objective or task_objective(data, config.label_smoothing)
    set_seed(config.seed)
    accelerator = Accelerator(gradient_accumulation_steps=config.accumulation)
    half = uses_bfloat16(config.precision)
    loader = DataLoader(
        data.train,
        batch_size=max(1, config.batch_size // config.accumulation),
        shuffle=True,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(config.seed),
    )
    optimizer = create_optimizer_v2(  # no decay of biases, norms and what the model's no_weight_decay() names
        model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, config.beta2), fused=True
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps_per_epoch = math.ceil(len(loader) / config.accumulation)
    total = math.inf if config.epochs is None else max(1, round(config.epochs * steps_per_epoch))
    clock = _Clock()
    result = TrainResult()
    losses: list[torch.Tensor] = []
    step, due = 0, 1
    model.train()
    for batch in _forever(loader):
        progress = _progress(step, total, clock.seconds, config)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * config.lr_factor(progress if config.seconds else (step + 0.5) / total)
        with accelerator.accumulate(model):
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=half):
                loss = objective.loss(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients and config.clip:
                accelerator.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        result.samples += batch["labels"].shape[0]
        if not accelerator.sync_gradients:
            continue
        step += 1
        progress = _progress(step, total, clock.seconds, config)
        if on_progress is not None:
            on_progress(min(1.0, progress))
        if not math.isfinite(loss.item()):
            result.diverged = f"the loss became {loss.item()} at step {step} with learning rate {config.lr:g}"
            break
        if progress >= due / config.evaluations or progress >= 1:
            clock.pause()
            mean = torch.stack(losses).mean().item()
            metric = objective.metric(model)
            seconds, epoch = clock.seconds, step / steps_per_epoch
            result.curve.append(Point(step=step, epoch=epoch, seconds=seconds, train_loss=mean, validation=metric))
            losses.clear()
            due = math.floor(progress * config.evaluations) + 1
            clock.resume()
        if progress >= 1:
            break
    clock.pause()
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
