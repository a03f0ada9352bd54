"""Records of where a run is and what it has shown."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation on the way."""

    step: int  # optimiser steps so far
    epoch: float  # passes over the training split so far
    seconds: float  # spent in training so far, evaluations left out
    train_loss: float  # mean over the steps since the evaluation before
    validation: float  # the objective's metric


@dataclass(kw_only=True)
class Place:
    """Where a run is."""

    step: int = 0  # optimiser steps that are done
    epoch: int = 0  # of the data
    batch: int = 0  # steps of the epoch whose data are used
    due: int = 1  # number of the next evaluation
    loss_sum: float = 0.0  # since the last evaluation
    loss_count: int = 0
    recent: list[float] = field(default_factory=list)  # the last losses


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimiser step, for a log or a display."""

    step: int  # its number, from 1
    epoch: float  # passes over the training split after it
    progress: float  # share of the budget that is spent
    loss: float  # mean over its samples, on all processes
    lr: float  # peak rate of its parameter groups
    seconds: float  # spent in training so far
    samples: int  # so far, on all processes
    point: Point | None = None  # if the model was evaluated after it


@dataclass(kw_only=True)
class TrainResult:
    """What became of a training run."""

    curve: list[Point] = field(default_factory=list)
    seconds: float = 0.0  # training alone, without evaluations
    samples: int = 0  # that went through the model, on all processes
    rewinds: int = 0  # returns to a checkpoint after a divergence
    diverged: str | None = None  # the sentence that says when the loss was no number any more

    @property
    def validation(self) -> float | None:
        """The metric at the end."""
        return self.curve[-1].validation if self.curve and not self.diverged else None
