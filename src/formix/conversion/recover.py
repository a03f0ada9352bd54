"""Recovery: the accuracy of a converted model won back by distillation from its source, in three stages."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Subset

from formix.conversion.objectives import Distillation
from formix.conversion.record import Conversion
from formix.data import Data, collate
from formix.training import Objective, TrainConfig, train
from formix.training.checkpoint import Checkpoints
from formix.training.loop import autocast_dtype

STAGES = ("match", "align", "task")
HELD_OUT = 256  # samples (of sentences: batches), evenly spaced, that a stage is judged on; its time counts as recovery


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of recovery and its budget."""

    name: str  # match, align or task
    lr: float = 5e-4  # peak learning rate of AdamW
    seconds: float | None = None  # wall-clock budget, or
    epochs: float | None = None  # passes over the data
    batch_size: int = 1  # samples per step; of sentences: batches of like length
    patience: int = 3  # evaluations without an improvement on the held-out part before the stage ends
    evaluations: int = 8  # on the held-out part
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.name not in STAGES:
            raise ValueError(f"The stage is {self.name!r}; stages are {', '.join(STAGES)}.")
        if self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it must be 1 or more.")
        self.training(0)

    def training(self, seed: int) -> TrainConfig:
        return TrainConfig(
            lr=self.lr,
            seconds=self.seconds,
            epochs=self.epochs,
            batch_size=self.batch_size,
            weight_decay=0.0,
            warmup=0.05,
            beta2=0.98,
            evaluations=self.evaluations,
            precision=self.precision,  # type: ignore[arg-type]
            seed=seed,
        )


class _NoImprovementError(Exception):
    """Ends a stage early."""


def recover(
    model: nn.Module,
    teacher: nn.Module,
    data: Data,
    stages: Sequence[Stage],
    *,
    labelled: bool = False,
    state: str | Path | None = None,
    seed: int = 0,
    metric: Callable[[nn.Module], Any] | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> list[dict[str, Any]]:
    """Train a converted model, in place, towards its teacher; returns what every stage did.

    Args:
        model: what `formix.convert` made.
        teacher: the source as a model of formix's (`formix.convert(source, "softmax")`).
        data: its train split is learned from, without labels unless `labelled`; the held-out loss is of validation.
        state: a directory for what is needed to go on: finished stages and checkpoints of the one under way.
        metric: measured after each stage, for the record.
        on_progress: called with a stage's name and the share of it that is done.

    Raises:
        ValueError: logits are to be matched and the model has none, or a loss that is no number.
    """
    place = None if state is None else Path(state)
    records, done = _resume(model, place, stages)
    conversion = Conversion.of(model)
    distillation = Distillation(teacher, model, data, labelled)
    for number, stage in enumerate(stages):
        if number < done:
            continue
        checkpoints = None if place is None else Checkpoints(place / f"stage{number}", keep=1, minutes=2.0)
        record = _run(model, distillation, data, stage, seed, checkpoints, on_progress)
        if metric is not None:
            record["metric"] = metric(model)
        records.append(record)
        if place is not None:
            _keep(model, place, records, stages)
    if conversion is not None:
        model.conversion = conversion  # type: ignore[assignment]
        conversion.stages += records
        conversion.data.append(json.loads(json.dumps(data.provenance, default=str)))
    model.eval()
    return records


def _run(
    model: nn.Module,
    distillation: Distillation,
    data: Data,
    stage: Stage,
    seed: int,
    checkpoints: Checkpoints | None,
    on_progress: Callable[[str, float], None] | None,
) -> dict[str, Any]:
    loss = getattr(distillation, stage.name)
    best: dict[str, Any] = {"loss": None, "state": None, "since": 0}
    curve: list[float] = []
    began = time.perf_counter()

    def held_out(current: nn.Module) -> float:
        value = _mean_loss(loss, current, data, stage)
        curve.append(value)
        if best["loss"] is None or value < best["loss"]:
            best.update(loss=value, since=0, state={k: v.detach().clone() for k, v in current.state_dict().items()})
        else:
            best["since"] += 1
            if best["since"] >= stage.patience:
                raise _NoImprovementError
        return value

    before = held_out(model)
    frozen = [] if stage.name == "task" else _embeddings(model)
    for parameter in frozen:
        parameter.requires_grad_(False)
    objective = Objective(loss=loss, metric=held_out, higher_is_better=False)
    stopped = False
    try:
        result = train(
            model,
            data,
            stage.training(seed),
            objective=objective,
            checkpoints=checkpoints,
            on_step=None if on_progress is None else lambda step: on_progress(stage.name, step.progress),
        )
        if result.diverged:
            raise ValueError(f"Stage {stage.name}: {result.diverged}; lower its learning rate.")
    except _NoImprovementError:
        stopped = True
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    model.load_state_dict(best["state"])
    return {
        "stage": stage.name,
        "trained": True,
        "settings": dataclasses.asdict(stage),
        "held_out_before": before,
        "held_out_after": best["loss"],
        "held_out": curve,
        "stopped_early": stopped,
        "seconds": time.perf_counter() - began,
    }


def _embeddings(model: Any) -> list[nn.Parameter]:
    """The word embeddings, which match and align leave as they are: the source's own, for words that the data lack."""
    return list(model.get_input_embeddings().parameters()) if hasattr(model, "get_input_embeddings") else []


@torch.no_grad()
def _mean_loss(loss: Any, model: nn.Module, data: Data, stage: Stage) -> float:
    total, number = 0.0, 0
    training, device = model.training, next(model.parameters()).device
    dtype = autocast_dtype(stage.precision)
    rows = range(0, len(data.validation), math.ceil(len(data.validation) / HELD_OUT))
    for batch in DataLoader(Subset(data.validation, rows), batch_size=stage.batch_size, collate_fn=collate):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            total += float(loss(model, {k: v.to(device) for k, v in batch.items()}))
        number += 1
    model.train(training)
    return total / number


def _keep(model: nn.Module, place: Path, records: list[dict[str, Any]], stages: Sequence[Stage]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    weights = place / f"{len(records)}.safetensors"
    save_file(tensors, str(weights) + ".partial")
    Path(str(weights) + ".partial").replace(weights)
    partial = place / "state.json.partial"
    written = {"records": records, "stages": [dataclasses.asdict(s) for s in stages], "weights": weights.name}
    partial.write_text(json.dumps(written, default=str))
    partial.replace(place / "state.json")


def _resume(model: nn.Module, place: Path | None, stages: Sequence[Stage]) -> tuple[list[dict[str, Any]], int]:
    if place is None or not (place / "state.json").is_file():
        return [], 0
    stored = json.loads((place / "state.json").read_text())
    if stored["stages"] != [dataclasses.asdict(s) for s in stages]:
        raise ValueError(f"{place} holds a recovery with other stages; give another directory or delete it.")
    model.load_state_dict(load_file(place / stored["weights"]))
    return stored["records"], len(stored["records"])
