"""A model looked at in evaluation mode, and left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards, an exception's way out too, every part is in its own mode
    again: a frozen part of a model in training stays in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])  # by its method, in which parts may do more
        for module, mode in modes.items():
            module.training = mode
