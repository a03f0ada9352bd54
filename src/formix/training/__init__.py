"""One training loop for all tasks, on one process or many."""

from formix.training.checkpoint import Checkpoints
from formix.training.config import TrainConfig
from formix.training.loop import train
from formix.training.memory import peak_step_memory
from formix.training.progress import Point, Step, TrainResult
from formix.training.signals import Interrupted
from formix.training.tasks import Objective, evaluate, forward, task_objective

__all__ = [
    "Checkpoints",
    "Interrupted",
    "Objective",
    "Point",
    "Step",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "forward",
    "peak_step_memory",
    "task_objective",
    "train",
]
