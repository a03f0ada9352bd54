"""Recovery: the accuracy of a converted model won back by distillation from its source, in three stages."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from formix.conversion.objectives import Distillation
from formix.conversion.record import Conversion
from formix.conversion.taps import answer, moved
from formix.data import Data, collate
from formix.models.modes import evaluating
from formix.records import replacing, write_atomically
from formix.training import Objective, TrainConfig, train
from formix.training.acceleration import autocast_dtype
from formix.training.checkpoint import Checkpoints, difference
from formix.training.parallel import start

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
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    metric: Callable[[nn.Module], Any] | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> list[dict[str, Any]]:
    """Train a converted model, in place, towards its teacher; returns what every stage did.

    Args:
        model: what `formix.convert` made, in float32; it comes back on the device that training uses.
        teacher: the source (`formix.conversion.carry.as_teacher`).
        data: its train split is learned from, without labels unless `labelled`; the held-out loss is of validation.
        state: a directory for what is needed to go on: finished stages and checkpoints of the one under way.
        settings: what else the outcome depends on; only a recovery with the same may go on from `state`.
        metric: measured after each stage, for the record.
        on_progress: called with a stage's name and the share of it that is done.

    Raises:
        ValueError: a model in half precision, stages with nothing to match (logits that the model has not, layers that
            are the source's), labels that no stage reads, a loss that is no number, or a `state` of another recovery.
    """
    dtype = next(model.parameters()).dtype
    if torch.promote_types(dtype, torch.float32) != dtype:
        raise ValueError(
            f"The model is in {dtype}, in which small steps are lost; recover it in float32: model.float()."
        )
    model.to(start().device)
    distillation = Distillation(teacher, model, data, labelled)
    refuse_stages(model, distillation, stages)
    place = None if state is None else Path(state)
    conversion = Conversion.of(model)
    identity = _identity(conversion, data, stages, {**(settings or {}), "labelled": labelled, "seed": seed})
    records, done = _resume(model, place, identity)
    for number, stage in enumerate(stages):
        if number < done:
            continue
        stage_place = None if place is None else place / f"stage{number}"
        record = _run(model, distillation, data, stage, seed, stage_place, identity, on_progress)
        if metric is not None:
            record["metric"] = metric(model)
        records.append(record)
        if place is not None:
            _keep(model, place, records, identity)
    if conversion is not None:
        model.conversion = conversion  # type: ignore[assignment]
        conversion.stages += records
        conversion.data.append(json.loads(json.dumps(data.provenance, default=str)))
    model.eval()
    return records


@torch.no_grad()
def refuse_stages(model: nn.Module, distillation: Distillation, stages: Sequence[Stage]) -> None:
    """Raise `ValueError` for stages that cannot do what is asked of them."""
    if any(stage.name == "match" for stage in stages) and not distillation.parts:
        raise ValueError(
            "No layer is converted, so that the stage match has none to match; leave it out of the stages."
        )
    if not any(stage.name == "task" for stage in stages):
        if distillation.labelled:
            raise ValueError("labelled is true, but labels are read by the stage task alone; add it to the stages.")
        return
    assert distillation.data is not None
    batch = next(iter(DataLoader(distillation.data.validation, batch_size=1, collate_fn=collate)))
    if answer(model.eval(), moved(batch, model)).logits is None:
        raise ValueError(f"A {type(model).__name__} has no logits for the stage task; leave it out of the stages.")


class _Watch:
    """A stage's held-out losses and the weights that are best by them, which every checkpoint of the stage holds."""

    def __init__(self) -> None:
        self.losses: list[float] = []  # the first is that before training
        self.weights: dict[str, Tensor] = {}
        self._spent, self._since = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent in the stage, up to the checkpoint that it goes on from and since then."""
        return self._spent + time.perf_counter() - self._since

    @property
    def best(self) -> float:
        return min(self.losses)

    @property
    def without_improvement(self) -> int:
        return len(self.losses) - 1 - self.losses.index(self.best)

    def add(self, loss: float, model: nn.Module) -> None:
        if not self.losses or loss < self.best:
            self.weights = _tensors(model)
        self.losses.append(loss)

    def write(self, _: nn.Module, directory: str | Path) -> None:
        place = Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        save_file(self.weights, place / "best.safetensors")
        (place / "watch.json").write_text(json.dumps({"held_out": self.losses, "seconds": self.seconds}))

    def read(self, directory: Path) -> None:
        stored = json.loads((directory / "watch.json").read_text())
        self.losses, self.weights = stored["held_out"], load_file(directory / "best.safetensors")
        self._spent, self._since = stored["seconds"], time.perf_counter()


def _run(
    model: nn.Module,
    distillation: Distillation,
    data: Data,
    stage: Stage,
    seed: int,
    place: Path | None,
    identity: dict[str, Any],
    on_progress: Callable[[str, float], None] | None,
) -> dict[str, Any]:
    loss = getattr(distillation, stage.name)
    watch, checkpoints = _Watch(), None

    def held_out(current: nn.Module) -> float:
        watch.add(_mean_loss(loss, current, data, stage), current)
        if watch.without_improvement >= stage.patience:
            raise _NoImprovementError
        return watch.losses[-1]

    if place is not None:
        checkpoints = Checkpoints(place, keep=1, minutes=2.0, identity=identity, write_model=watch.write)
        if (latest := checkpoints.open()) is not None:
            watch.read(latest / "model")
    if not watch.losses:
        held_out(model)
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
    model.load_state_dict(watch.weights)
    return {
        "stage": stage.name,
        "trained": True,
        "settings": dataclasses.asdict(stage),
        "held_out_before": watch.losses[0],
        "held_out_after": watch.best,
        "held_out": watch.losses,
        "stopped_early": stopped,
        "seconds": watch.seconds,
    }


def _embeddings(model: Any) -> list[nn.Parameter]:
    """The word embeddings, which match and align leave as they are: the source's own, for words that the data lack."""
    return list(model.get_input_embeddings().parameters()) if hasattr(model, "get_input_embeddings") else []


@torch.no_grad()
def _mean_loss(loss: Any, model: nn.Module, data: Data, stage: Stage) -> float:
    total, number = 0.0, 0
    device, dtype = next(model.parameters()).device, autocast_dtype(stage.precision)
    rows = range(0, len(data.validation), math.ceil(len(data.validation) / HELD_OUT))
    with evaluating(model), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for batch in DataLoader(Subset(data.validation, rows), batch_size=stage.batch_size, collate_fn=collate):
            total += float(loss(model, {k: v.to(device) for k, v in batch.items()}))
            number += 1
    return total / number


def _identity(
    conversion: Conversion | None, data: Data, stages: Sequence[Stage], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a recovery is of, as plain data."""
    identity = {
        **settings,
        "source": None if conversion is None else conversion.source_sha256,
        "design": None if conversion is None else conversion.plan["design"],
        "data": data.provenance.get("sha256"),
        "stages": {str(number): dataclasses.asdict(stage) for number, stage in enumerate(stages)},
    }
    return json.loads(json.dumps(identity))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}


def _keep(model: nn.Module, place: Path, records: list[dict[str, Any]], identity: dict[str, Any]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    weights = place / f"{len(records)}.safetensors"
    with replacing(weights) as temporary:
        save_file(_tensors(model), temporary)
    written = {"records": records, "identity": identity, "weights": weights.name}
    write_atomically(place / "state.json", json.dumps(written, default=str))


def _resume(model: nn.Module, place: Path | None, identity: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    if place is None or not (place / "state.json").is_file():
        return [], 0
    stored = json.loads((place / "state.json").read_text())
    if changed := difference(stored["identity"], identity):
        name, theirs, mine = changed
        raise ValueError(
            f"{place} is of a recovery with {name} {theirs} and this one has {name} {mine}; give the same, or remove "
            "it to begin again."
        )
    model.load_state_dict(load_file(place / stored["weights"]))
    return stored["records"], len(stored["records"])
