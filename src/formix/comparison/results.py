"""The results file of a comparison: what `results.json` holds, how it is read, checked and written.

The schema is described for readers in docs/results_schema.md. Numbers derived from the runs (means, intervals, the
Pareto front) are not stored; `formix.comparison.statistics` computes them.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from formix.environment import Environment
from formix.records import plain, read, write, write_atomically

SCHEMA: Literal["formix.results/1"] = "formix.results/1"

TaskKind = Literal["image-classification", "causal-lm", "masked-lm", "sequence-classification", "sequence-regression"]
Metric = Literal["accuracy", "bits_per_byte", "perplexity", "matthews_corrcoef", "spearman"]
Status = Literal["ok", "diverged"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every design is asked to do."""

    data: str  # the name given to --data
    kind: TaskKind  # decides the head, the loss and what an item is
    metric: Metric  # what `validation` and `test` are
    higher_is_better: bool  # direction of the metric
    chance: float | None = None  # the metric of guessing; null where that has no meaning
    baselines: dict[str, float] = field(default_factory=dict)  # other reference values on the test split, by name
    splits: dict[str, int] = field(default_factory=dict)  # items per split, e.g. {"train": 1200, ...}
    model: str  # the trunk all designs share
    provenance: str  # where the data come from, in words


@dataclass(frozen=True, kw_only=True)
class DesignRecord:
    """One requested design, whether or not it can do the task."""

    design: str  # name
    description: str = ""  # one line: what it is, or its formula
    definition: dict[str, Any] = field(default_factory=dict)  # the Design as JSON
    refused: str | None = None  # why this design cannot do the task; null when it can


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One evaluation during training."""

    step: int  # optimiser steps done
    epoch: float  # passes over the training split done
    seconds: float  # training time so far, evaluation not counted
    train_loss: float | None = None  # mean training loss since the last point
    validation: float | None = None  # metric on the validation split


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One training run: a design, a learning rate, a seed."""

    design: str  # name, as in `designs`
    seed: int  # seed of the weights and of the order of the batches
    lr: float  # peak learning rate
    status: Status  # "diverged": the loss became NaN or infinite and the run ended there
    message: str | None = None  # for a diverged run: the step and the learning rate
    selected: bool = False  # this learning rate was chosen on validation for this design
    validation: float | None = None  # the validation metric the learning rate is chosen by
    test: float | None = None  # metric on the test split; null unless selected
    curve: tuple[CurvePoint, ...] = ()  # evaluations in order
    parameters: int | None = None  # parameters, frozen ones included
    flops: int | None = None  # FLOPs of one item's forward pass; of sentences, one of the mean length
    train_items_per_second: float | None = None  # of steps, the designs timed in turn; without latency, of the run
    train_seconds: float | None = None  # training time, evaluation not counted
    # precision -> batch size -> ms per batch
    latency_ms: dict[str, dict[str, float | None]] = field(default_factory=dict)
    peak_memory_bytes: int | None = None  # peak memory of a training step; of sentences, with the longest
    notes: tuple[str, ...] = ()  # which metric is null because it is no number, in words
    config_hash: str = ""  # of everything that determines this run; equal hash, equal run

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}, expected a positive number")
        if self.status == "diverged" and not self.message:
            raise ValueError("message is empty, but a diverged run states its step and learning rate")
        for precision, by_batch in self.latency_ms.items():
            if not all(batch.isdecimal() for batch in by_batch):
                raise ValueError(f"latency_ms.{precision} has the keys {list(by_batch)}, expected batch sizes")
        for name in ("validation", "test"):  # a metric that is undefined (NaN) counts as not measured
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                object.__setattr__(self, name, None)
                note = f"{self.design} with seed {self.seed} and learning rate {self.lr:g}: {name} came out as {value}"
                object.__setattr__(self, "notes", (*self.notes, note))


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything one comparison on one task found."""

    schema: Literal["formix.results/1"] = SCHEMA  # version of this format
    command: str  # the command line, as typed
    created: str  # ISO 8601 time
    environment: Environment  # software and machine
    config: dict[str, Any]  # the resolved configuration
    task: Task  # data, metric, reference values
    designs: tuple[DesignRecord, ...]  # in the order requested
    runs: tuple[RunRecord, ...]  # in the order run

    def __post_init__(self) -> None:
        names = [record.design for record in self.designs]
        if repeated := _first_repeated(names):
            raise ValueError(f"designs lists {repeated!r} twice, expected each design once")
        refused = {record.design for record in self.designs if record.refused is not None}
        for index, run in enumerate(self.runs):
            if run.design not in names:
                raise ValueError(f"runs[{index}].design is {run.design!r}, which designs does not list")
            if run.design in refused:
                raise ValueError(f"runs[{index}].design is {run.design!r}, which designs lists as refused")
        if again := _first_repeated([(run.design, run.lr, run.seed) for run in self.runs]):
            raise ValueError("runs holds design {!r}, lr {}, seed {} twice, expected once".format(*again))
        chosen = {(run.design, run.lr) for run in self.runs if run.selected}
        if twice := _first_repeated([design for design, _ in sorted(chosen)]):
            raise ValueError(f"runs selects two learning rates for {twice!r}, expected one per design")


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read and check a results file; a file that is not one is a ValueError naming the file and the field."""
    return read(Results, path, "formix compare")


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """Read and check a file that holds a single run (what an interrupted comparison continues from)."""
    return read(RunRecord, path, "formix compare")


def write_results(results: Results, path: str | os.PathLike[str]) -> None:
    """Write a results file; the file appears complete or not at all. Numbers that are not finite become null."""
    write(results, path)


def write_run(run: RunRecord, path: str | os.PathLike[str]) -> None:
    """Write one run; the file appears complete or not at all. Numbers that are not finite become null."""
    write(run, path)


def write_csv(results: Results, path: str | os.PathLike[str]) -> None:
    """Write one row per run with flat columns; the curve stays in the JSON file."""
    timings = latency_settings(results)
    rows = []
    for run in results.runs:
        row = {"data": results.task.data, "metric": results.task.metric, **plain(run)}
        for name in ("curve", "latency_ms"):
            del row[name]
        row["notes"] = " ".join(run.notes)
        for precision, batch in timings:
            row[f"latency_ms_{precision}_batch{batch}"] = run.latency_ms.get(precision, {}).get(batch)
        rows.append(row)
    names = [f.name for f in dataclasses.fields(RunRecord) if f.name not in ("curve", "latency_ms")]
    names = ["data", "metric", *names, *(f"latency_ms_{precision}_batch{batch}" for precision, batch in timings)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def latency_settings(results: Results) -> list[tuple[str, str]]:
    """The (precision, batch size) pairs for which at least one run has a latency, float32 and small batches first."""
    pairs = {
        (precision, batch)
        for run in results.runs
        for precision, by_batch in run.latency_ms.items()
        for batch, value in by_batch.items()
        if value is not None
    }
    return sorted(pairs, key=lambda pair: (pair[0] != "float32", pair[0], int(pair[1])))


def _first_repeated(items: list[Any]) -> Any:
    return next((item for item, times in Counter(items).items() if times > 1), None)
