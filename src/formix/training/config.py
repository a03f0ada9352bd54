"""How a model is trained: one dataclass, saved with the result."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from formix.data.augmentation import Augmentation
from formix.training.schedules import Schedule, lr_factor

OptimizerName = Literal["adamw", "adam", "sgd"]
Loss = Literal["softmax", "sigmoid"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
OnDivergence = Literal["stop", "rewind"]
CHOICES = {
    "optimizer": OptimizerName,
    "schedule": Schedule,
    "loss": Loss,
    "precision": Precision,
    "on_divergence": OnDivergence,
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Budget, optimiser and precision of one training run."""

    lr: float = 1e-3  # peak learning rate
    epochs: float | None = 10.0  # passes over the training split; None with `seconds`
    seconds: float | None = None  # wall-clock budget instead of epochs; runs are then not repeatable to the last bit
    batch_size: int = 128  # samples per optimiser step
    accumulation: int = 1  # parts that a batch is divided into to save memory; the gradient is that of the whole
    optimizer: OptimizerName = "adamw"  # sgd has Nesterov's momentum
    weight_decay: float = 0.05  # of weight matrices only, not of biases and norms
    independent_decay: bool = False  # decay by weight_decay x schedule, not multiplied by lr (big_vision's rule)
    layer_decay: float = 1.0  # factor on the learning rate from each layer to the one below (fine-tuning: 0.65 to 0.9)
    beta1: float = 0.9  # Adam's first moment, or SGD's momentum
    beta2: float = 0.999  # Adam's second moment
    eps: float = 1e-8  # Adam's
    schedule: Schedule = "cosine"  # of the learning rate, after the warm-up; see formix.training.schedules
    warmup: float = 0.1  # share of the budget in which the learning rate rises linearly
    cooldown: float = 0.0  # share of the budget at its end in which constant and rsqrt fall linearly
    lr_floor: float = 0.0  # where the learning rate ends, as a share of lr
    clip: float = 1.0  # largest norm of the gradient; 0 turns clipping off
    spike: float = 0.0  # a loss above so many times the recent median is a divergence, as NaN is; 0: off
    on_divergence: OnDivergence = "stop"  # rewind: to the last checkpoint, then on with the data after the divergence
    loss: Loss = "softmax"  # cross-entropy or, of classification alone, one binary one per class, summed
    label_smoothing: float = 0.0  # share of the target that all classes, or tokens, get alike; not of regression
    augmentation: Augmentation = field(default_factory=Augmentation)  # of training images
    ema: float = 0.0  # decay of the moving average of the weights, which is what is then evaluated; 0: none
    precision: Precision = "auto"  # autocast; auto: bfloat16 where it is fast
    activation_checkpointing: bool = False  # compute activations again in the backward pass: slower, less memory
    compile: bool = False  # torch.compile; the first steps then take minutes
    evaluations: int = 5  # evenly spaced evaluations on the validation split, the last one at the end
    seed: int = 0  # weights, order of batches, dropout

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.seconds is None):
            raise ValueError(
                f"epochs is {self.epochs} and seconds is {self.seconds}; give exactly one budget, "
                "and null for the other."
            )
        for name in ("lr", "epochs", "seconds"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ValueError(f"{name} is {value}; it must be above 0 and finite.")
        if (self.epochs or 0) > 1e6 or (self.seconds or 0) > 1e8 or self.batch_size > 2**30:
            raise ValueError(
                f"epochs is {self.epochs}, seconds {self.seconds} and batch_size {self.batch_size}; a run has at most "
                "a million epochs or three years, and a batch at most 2^30 samples."
            )
        if self.lr > 10:
            raise ValueError(f"lr is {self.lr}; a learning rate lies between 1e-6 and 1 or so.")
        for name in ("batch_size", "accumulation", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation is {self.accumulation}, more than the {self.batch_size} samples of a batch."
            )
        for name in ("warmup", "cooldown", "beta1", "beta2", "label_smoothing", "lr_floor", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must be above 0 and at most 1.")
        for name in ("weight_decay", "clip", "eps", "spike"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be finite and 0 or more.")
        for name, choice in CHOICES.items():
            allowed = get_args(choice)
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {_either(allowed)}.")
        if self.warmup + self.cooldown > 1:
            raise ValueError(
                f"warmup {self.warmup} and cooldown {self.cooldown} are more than the whole run; make them smaller."
            )
        if self.schedule == "cosine" and self.cooldown:
            raise ValueError(
                f"cooldown is {self.cooldown}, and a cosine falls by itself; use it with constant or rsqrt."
            )
        if self.schedule == "rsqrt" and not self.warmup:
            raise ValueError("schedule is 'rsqrt' and warmup is 0; the warm-up is what its decay is measured in.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be between 0 and {2**32 - 1}.")

    def lr_factor(self, progress: float) -> float:
        """Share of the peak learning rate when `progress` (0 to 1) of the budget is spent."""
        return lr_factor(progress, self.schedule, warmup=self.warmup, cooldown=self.cooldown, floor=self.lr_floor)


def _either(allowed: tuple[str, ...]) -> str:
    return ", ".join(map(repr, allowed[:-1])) + f" or {allowed[-1]!r}"
