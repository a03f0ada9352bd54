"""Experiment trackers by name, through accelerate's interfaces to them; off unless asked for."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = ("tensorboard", "trackio", "wandb", "mlflow")


class Trackers:
    """The trackers `names` of one run: every figure goes to each of them, from the first process alone.

    They start with the first figure, when the processes of a run have found each other. TensorBoard's files go to
    directory/tensorboard; the others keep theirs where their own settings say, under the directory's name.

    Raises:
        ValueError: a tracker that formix does not know or that is not installed.
    """

    def __init__(self, names: Sequence[str], directory: str | Path, config: Any) -> None:
        check_trackers(names)
        self.names, self.directory, self.config = names, Path(directory).resolve(), flattened(config)
        self.started: list[Any] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name at an optimiser step."""
        if len(self.started) < len(self.names):
            self._start()
        for tracker in self.started:
            tracker.log(dict(values), step=step)

    def finish(self) -> None:
        for tracker in self.started:
            tracker.finish()

    def _start(self) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's logger wants it
        for name in self.names:
            kind: Any = LOGGER_TYPE_TO_CLASS[name]
            here = kind.requires_logging_directory
            tracker = kind(name, str(self.directory)) if here else kind(self.directory.name)
            tracker.start()
            tracker.store_init_configuration(self.config)
            self.started.append(tracker)


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for a name that is unknown, or whose package is not installed."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"{name!r} is no tracker; formix knows {', '.join(NAMES)}.")
        if importlib.util.find_spec(name) is None:
            extra = "formix[trackers]" if name in ("tensorboard", "trackio") else name
            raise ValueError(f"The tracker {name!r} is not installed; pip install {extra}.")


def flattened(config: Any) -> dict[str, bool | int | float | str]:
    """A dataclass or mapping as plain values by dotted names, the only form that all trackers take."""
    fields = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)  # type: ignore[arg-type]
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": v for inner, v in flattened(value).items()}
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
