"""How a model is trained: one dataclass, saved with the result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Budget, optimiser and precision of one training run."""

    lr: float = 1e-3  # peak learning rate of AdamW
    epochs: float | None = 10.0  # passes over the training split; None with `seconds`
    seconds: float | None = None  # wall-clock budget instead of epochs; runs are then not repeatable to the last bit
    batch_size: int = 128  # samples per optimiser step
    accumulation: int = 1  # parts that a batch is divided into to save memory; the gradient is that of the whole
    weight_decay: float = 0.05  # of weight matrices only, not of biases and norms
    beta2: float = 0.999  # AdamW's second moment
    warmup: float = 0.1  # share of the budget in which the learning rate rises linearly; a cosine to 0 follows
    clip: float = 1.0  # largest norm of the gradient; 0 turns clipping off
    label_smoothing: float = 0.0  # classification only
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 autocast where the processor has it
    evaluations: int = 5  # evenly spaced evaluations on the validation split, the last one at the end
    seed: int = 0  # weights, order of batches, dropout

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.seconds is None):
            raise ValueError(f"epochs is {self.epochs} and seconds is {self.seconds}; give exactly one budget.")
        for name in ("lr", "epochs", "seconds"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ValueError(f"{name} is {value}; it must be above 0 and finite.")
        if self.lr > 10:
            raise ValueError(f"lr is {self.lr}; a learning rate of AdamW lies between 1e-6 and 1e-1 or so.")
        for name in ("batch_size", "accumulation", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation is {self.accumulation}, more than the {self.batch_size} samples of a batch."
            )
        for name in ("warmup", "beta2", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1.")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be finite and 0 or more.")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision is {self.precision!r}; it must be 'auto', 'float32' or 'bfloat16'.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be between 0 and {2**32 - 1}.")

    def lr_factor(self, progress: float) -> float:
        """Share of the peak learning rate when `progress` (0 to 1) of the budget is spent."""
        if progress < self.warmup:
            return progress / self.warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup))))
