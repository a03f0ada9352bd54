"""One step of training as a function, for whoever measures it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from formix.data import Batch, Data
from formix.data.augmentation import augmented
from formix.data.draws import epoch_order
from formix.training.acceleration import autocast_dtype
from formix.training.config import TrainConfig
from formix.training.optimizers import make_optimizer
from formix.training.tasks import task_objective


@dataclass(frozen=True, kw_only=True)
class OneStep:
    """A step that can be taken again and again: always on the same samples, which are read and augmented anew."""

    take: Callable[[], None]  # changes the model
    samples: int  # of a step
    batch: Batch  # the samples, on the CPU


def one_step(model: nn.Module, data: Data, config: TrainConfig) -> OneStep:
    """The step of the run `config` on `model`, where the model is; with accumulation that of a part of the batch."""
    model.train()
    device = next(model.parameters()).device
    training = augmented(data, config.augmentation, config.seed).train
    samples = min(math.ceil(config.batch_size / config.accumulation), len(training))
    indices = epoch_order(training, 0, config.seed)[:samples].tolist()
    optimizer = make_optimizer(model, config)
    objective = task_objective(data, config.label_smoothing, config.loss)
    half = autocast_dtype(config.precision)

    def take() -> None:
        batch = {name: tensor.to(device) for name, tensor in training.__getitems__(indices).items()}
        with torch.autocast(device.type, half, enabled=half is not None):
            objective.loss(model, batch).backward()
        if config.clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()

    return OneStep(take=take, samples=samples, batch=training.__getitems__(indices))
