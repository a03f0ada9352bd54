"""One training loop for all tasks, on accelerate."""

from formix.training.config import TrainConfig
from formix.training.loop import Point, TrainResult, train
from formix.training.memory import peak_step_memory
from formix.training.tasks import Objective, evaluate, forward, task_objective

__all__ = [
    "Objective",
    "Point",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "forward",
    "peak_step_memory",
    "task_objective",
    "train",
]
