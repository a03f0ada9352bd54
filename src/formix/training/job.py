"""A training run as a user asks for it: what to train on what, and where its results go."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from formix.data import Data
from formix.data.config import DataConfig
from formix.records import UNFINISHED, plain, write_atomically
from formix.training.parallel import Parallel
from formix.training.progress import Step

# what decides the outcome beside TrainConfig; a run goes on only with the same
DEFINING = (
    "data", "task", "mask_probability", "design", "model", "model_args", "sequence_length", "tokenizer", "img_size",
    "validation_fraction", "test_fraction", "limit",
)  # fmt: skip

LOCK = ".lock"
PATIENCE = 10.0  # seconds; the loader's processes of a run that was killed hold the lock for up to 5


@dataclass(frozen=True, kw_only=True)
class JobConfig(DataConfig):
    """The data, the model, and where and how the run is carried out."""

    design: str | None = None  # a design or combination; None: a directory's own, or softmax
    model: str | None = None  # a timm or text model's name, or a directory with weights; None: a small one that fits
    model_args: dict[str, Any] = field(default_factory=dict)  # its arguments: {drop_path_rate: 0.1}

    out: str = "runs/train"  # model, metrics.csv, config.json and checkpoints go there; a run there is gone on with
    keep: int = 3  # newest checkpoints that stay, beside the best
    save_minutes: float = 10.0  # between checkpoints, which are also written at evaluations; 0: only there
    save_steps: int = 0  # between checkpoints, in optimiser steps; 0: by time alone
    log_steps: int = 10  # between rows of metrics.csv
    trackers: str = ""  # tensorboard, trackio, wandb, mlflow: names with commas
    diagnostics: bool = False  # at evaluations, every layer's rms, spread and active share, to diagnostics.csv
    plan: bool = False  # print what the run takes in operations, memory and time, and do not start it
    parallel: Parallel = "ddp"  # with several processes: copies of the model (ddp) or shards of it (fsdp)
    workers: int = 0  # processes that load data; 0: the training process itself
    threads: int | None = None  # CPU threads; None: PyTorch's choice

    def __post_init__(self) -> None:
        for name, least in (("keep", 1), ("save_minutes", 0), ("save_steps", 0), ("log_steps", 1), ("workers", 0)):
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if self.threads is not None and not 1 <= self.threads <= 4096:
            raise ValueError(f"threads is {self.threads}; it must be 1 to 4096.")

    def identity(self, data: Data) -> dict[str, Any]:
        """What a checkpoint is of, the contents of the data included."""
        defining = {name: getattr(self, name) for name in DEFINING}
        return {**defining, f"sha256 of the {self.contents}": data.provenance.get("sha256")}


class OutputDirectory:
    """`--out`: config.json, metrics.csv, diagnostics.csv if asked for, result.json, model/ and checkpoints/.

    Raises:
        ValueError: a directory that holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.json", self.path / "metrics.csv"
        self.diagnostics = self.path / "diagnostics.csv"
        self.model, self.checkpoints = self.path / "model", self.path / "checkpoints"
        self._lock = FileLock(self.path / LOCK, timeout=PATIENCE)
        if self.path.exists() and not is_free(self.path) and not self._is_of_a_run():
            raise ValueError(f"{self.path} exists and is no training run of formix's; choose another with --out.")

    def _is_of_a_run(self) -> bool:
        """Whether config.json is a run's: a model has one too, which must not be written over."""
        if self.checkpoints.is_dir():
            return self.config.is_file()
        try:
            return {"out", "lr"} <= _read_settings(self.config).keys()
        except (OSError, ValueError):
            return False

    def claim(self, config: dict[str, Any]) -> None:
        """Write down what runs there; a run with checkpoints stays, since they decide who may go on with it.

        The directory is this process's until `release`, or until the process ends.

        Raises:
            OSError: it cannot be written to, or another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise OSError("another formix train is under way there; wait for it, or choose another --out") from None
        if self.config.is_file() and any(self.checkpoints.glob("step-*")):
            return
        write_atomically(self.config, json.dumps(config, indent=1) + "\n")

    def release(self) -> None:
        """Let others have the directory."""
        self._lock.release()

    def finish(self, checkpoint: Path, result: dict[str, Any]) -> None:
        """Put the model of the last checkpoint in `model/`, and the result beside it."""
        new = self.path / ".partial-model"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(checkpoint / "model", new)
        shutil.rmtree(self.model, ignore_errors=True)
        new.replace(self.model)
        write_atomically(self.path / "result.json", json.dumps(plain(result), indent=1) + "\n")


def is_free(path: Path) -> bool:
    """Whether a directory has nothing in it but what a start that was killed leaves: its lock, and a settings file that
    was being written."""
    return path.is_dir() and all(
        p.name == LOCK or (p.name.startswith(".") and p.name.endswith(UNFINISHED)) for p in path.iterdir()
    )


def trained_model(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The directory of the model that a training run made, and the run's settings; of any other it is the model's
    own, and there are none.

    Raises:
        ValueError: a run that has made no model yet.
    """
    if not (directory / "checkpoints").is_dir():
        return directory, {}
    model, config = directory / "model", directory / "config.json"
    if not model.is_dir():
        raise ValueError(f"{directory} has no model yet; finish its training, or give a checkpoint's model directory.")
    try:
        return model, _read_settings(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"{config} is damaged ({error}); give {model} instead.") from None


def _read_settings(path: Path) -> dict[str, Any]:
    """The settings of a run, from its config.json.

    Raises:
        OSError, ValueError: there are none.
    """
    settings = json.loads(path.read_text())
    if not isinstance(settings, dict) or "data" not in settings:
        raise ValueError("it has no settings of a run")
    return settings


class _StepsFile:
    """A CSV file whose first column is the step. Steps that are done again, because a run goes on from a checkpoint or
    returned to one, lose their rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: float = math.inf

    def reach(self, step: int) -> None:
        """A step is done; to be told of every one."""
        if step <= self._last:
            _keep_before(self.path, step)
        self._last = step

    def append(self, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Rows, complete on disk before the next checkpoint is written."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows] if new else rows)


class MetricsFile(_StepsFile):
    """metrics.csv: a row every `every` steps and at every evaluation."""

    def __init__(self, path: Path, every: int) -> None:
        super().__init__(path)
        self.every = every

    def add(self, step: Step) -> None:
        """Every step, of which some become a row."""
        self.reach(step.step)
        if step.step % self.every and step.point is None:
            return
        row = {
            "step": step.step,
            "epoch": step.epoch,
            "seconds": round(step.seconds, 3),
            "samples": step.samples,
            "lr": step.lr,
            "loss": step.loss,
            "train_loss": step.point.train_loss if step.point else None,
            "validation": step.point.validation if step.point else None,
        }
        self.append(list(row), [list(row.values())])


class DiagnosticsFile(_StepsFile):
    """diagnostics.csv: a row for every figure of every layer at an evaluation."""

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of `formix.training.diagnostics.diagnose`, by "name/layer"."""
        rows = [[step, *name.split("/", 1), value] for name, value in figures.items()]
        self.append(["step", "figure", "layer", "value"], rows)


def _keep_before(path: Path, step: int) -> None:
    """Remove the rows from `step` on, and one that was not written whole; the first column is the step."""
    if not path.exists():
        return
    try:
        header, *rows = path.read_text().splitlines(keepends=True) or [""]
        kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) < step]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); repair or remove it, and start the run again.") from None
    write_atomically(path, "".join([header, *kept]) if header.endswith("\n") else "")
    if not header.endswith("\n"):
        path.unlink()


def combined(job: JobConfig, training: Any) -> dict[str, Any]:
    """Both halves of a configuration as the flat JSON that config.json holds."""
    return {**dataclasses.asdict(job), **dataclasses.asdict(training)}
