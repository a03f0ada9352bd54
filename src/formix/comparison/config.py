"""What a comparison is: one dataclass for the study's YAML, the command line's flags and the saved record."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from formix.data.config import DataConfig
from formix.design import design, split_outside_brackets
from formix.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class CompareConfig(DataConfig):
    """Designs trained side by side on the same data, budget and seeds."""

    designs: str | list[str] = "softmax,relu,sima,activator,paf,skip"  # the first, or softmax, is the baseline
    seeds: int = 3  # runs of every design, with seeds 0, 1, ...
    # learning rates; of several, each design keeps the one that is best on validation with seed 0
    lrs: str | float | list[float] = "1e-3"
    epochs: float | None = None  # budget of every run; 10 if neither this nor `seconds` is given
    seconds: float | None = None  # budget of every run in seconds of training instead
    batch_size: int = 128  # samples per optimiser step
    accumulation: int = 1  # parts that a batch is divided into to save memory
    weight_decay: float = 0.05  # AdamW's, of weight matrices
    warmup: float = 0.1  # share of the budget with a rising learning rate
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    label_smoothing: float = 0.0  # share of the target that all classes, or tokens, get alike; not of regression
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 autocast where the processor has it
    evaluations: int = 5  # points of the learning curve

    model: str | None = None  # a timm or text model's name, or a directory with weights; None: a small one that fits
    model_args: dict[str, Any] = field(default_factory=dict)  # its arguments: {embed_dim: 64, depth: 4}

    # time inference at batch 1 and 32 in float32 and bfloat16, and training steps, the designs in turn
    latency: bool = True
    threads: int | None = None  # CPU threads; None: PyTorch's choice
    out: str = "runs/compare"  # where results.json, results.csv and report.html go

    def __post_init__(self) -> None:
        for name in ("designs", "lrs"):  # YAML has lists and numbers where the command line has commas
            value = getattr(self, name)
            listed = value if isinstance(value, list) else [value]
            object.__setattr__(self, name, ",".join(map(str, listed)))
        if self.epochs is None and self.seconds is None:
            object.__setattr__(self, "epochs", 10.0)
        if self.seeds < 1 or self.seeds > 1000:
            raise ValueError(f"seeds is {self.seeds}; it must be 1 to 1000.")
        if self.threads is not None and not 1 <= self.threads <= 4096:
            raise ValueError(f"threads is {self.threads}; it must be 1 to 4096.")
        names = self.design_names
        if not names:
            raise ValueError("designs is empty; name at least one, such as 'softmax,relu'.")
        if len(set(names)) != len(names):
            raise ValueError(f"designs is {self.designs!r}; a design is named twice.")
        for name in names:
            try:
                design(name)
            except ValueError as error:
                raise ValueError(f"designs: {error}") from None
        for lr in self.learning_rates:
            try:
                self.training(lr, seed=0)
            except ValueError as error:  # which calls it lr
                raise ValueError(re.sub("^lr is", "lrs has", str(error))) from None

    @property
    def design_names(self) -> list[str]:
        """The designs one by one; commas inside parentheses belong to a design's options."""
        return [name.strip() for name in split_outside_brackets(str(self.designs), ",") if name.strip()]

    @property
    def learning_rates(self) -> list[float]:
        try:
            rates = [float(lr) for lr in str(self.lrs).split(",") if lr.strip()]
        except ValueError:
            raise ValueError(f"lrs is {self.lrs!r}; it must be numbers with commas, such as '3e-4,1e-3'.") from None
        if not rates or len(set(rates)) != len(rates):
            raise ValueError(f"lrs is {self.lrs!r}; it must be one or more different numbers.")
        return rates

    def training(self, lr: float, seed: int) -> TrainConfig:
        """The training of one run."""
        return TrainConfig(
            lr=lr,
            seed=seed,
            epochs=self.epochs,
            seconds=self.seconds,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            clip=self.clip,
            label_smoothing=self.label_smoothing,
            precision=self.precision,
            evaluations=self.evaluations,
        )
