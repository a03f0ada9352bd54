"""The results file of a comparison: what `results.json` holds, how it is read, checked and written.

The schema is described for readers in docs/results_schema.md. Numbers derived from the runs (means, intervals, the
Pareto front) are not stored; `formix.comparison.statistics` computes them.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

SCHEMA: Literal["formix.results/1"] = "formix.results/1"

TaskKind = Literal["image-classification", "causal-lm", "sequence-classification", "sequence-regression"]
Metric = Literal["accuracy", "bits_per_byte", "matthews_corrcoef", "spearman"]
Status = Literal["ok", "diverged"]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The software and the machine of a comparison."""

    formix: str  # version
    python: str  # version
    torch: str  # version
    timm: str | None = None  # version; null when the task does not use it
    transformers: str | None = None  # version; null when the task does not use it
    cpu: str  # the processor's model name
    instruction_set: str  # what PyTorch's kernels use, e.g. "AVX512"
    threads: int  # threads PyTorch computes with
    platform: str  # operating system and architecture
    commit: str | None = None  # git commit of formix, when it runs from a checkout


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
    parameters: int | None = None  # trainable parameters
    flops: int | None = None  # FLOPs of one item's forward pass
    train_items_per_second: float | None = None  # training throughput
    train_seconds: float | None = None  # training time, evaluation not counted
    latency_ms: dict[str, dict[str, float | None]] = field(
        default_factory=dict
    )  # precision -> batch size -> ms per batch
    peak_memory_bytes: int | None = None  # peak memory of training
    notes: tuple[str, ...] = ()  # why a value is null, in words
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


Record = TypeVar("Record", bound=Results | RunRecord)


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read and check a results file; a file that is not one is a ValueError naming the file and the field."""
    return _read_file(Results, Path(path))


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """Read and check a file that holds a single run (what an interrupted comparison continues from)."""
    return _read_file(RunRecord, Path(path))


def write_results(results: Results, path: str | os.PathLike[str]) -> None:
    """Write a results file; the file appears complete or not at all. Numbers that are not finite become null."""
    write_atomically(path, json.dumps(_plain(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_run(run: RunRecord, path: str | os.PathLike[str]) -> None:
    """Write one run; the file appears complete or not at all. Numbers that are not finite become null."""
    write_atomically(path, json.dumps(_plain(run), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(results: Results, path: str | os.PathLike[str]) -> None:
    """Write one row per run with flat columns; the curve stays in the JSON file."""
    timings = latency_settings(results)
    rows = []
    for run in results.runs:
        row = {"data": results.task.data, "metric": results.task.metric, **_plain(run)}
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


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file at `path` in one step, so that a crash leaves the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_file(kind: type[Record], path: Path) -> Record:
    remedy = "restore the file from a copy, or move it away and run the comparison again"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give the path of a file that formix compare wrote") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error.msg} at line {error.lineno}); {remedy}") from None
    if kind is Results and isinstance(value, dict) and value.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(
            f"{path}: schema is {value['schema']!r}, but this formix reads {SCHEMA!r}; "
            "use the formix version that wrote the file, or run the comparison again"
        )
    try:
        record: Record = _parse(kind, value, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {remedy}") from None
    return record


def _parse(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`, following the annotations of the dataclasses; `where` names the field in messages."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _parse_record(kind, value, where)
    if origin in (types.UnionType, Union):  # only `X | None` occurs
        return None if value is None else _parse(arguments[0], value, where)
    if origin is Literal:
        return value if value in arguments else _reject(where, value, "one of " + ", ".join(map(repr, arguments)))
    if origin is dict:
        entries = value if isinstance(value, dict) else _reject(where, value, "an object {...}")
        return {key: _parse(arguments[1], entry, f"{where}.{key}") for key, entry in entries.items()}
    if origin is tuple:
        items = value if isinstance(value, list) else _reject(where, value, "a list [...]")
        return tuple(_parse(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(items))
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if is_number else _reject(where, value, "a finite number")
    if kind is int:
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return value if is_count else _reject(where, value, "a whole number, 0 or more")
    return value if isinstance(value, kind) else _reject(where, value, {str: "text", bool: "true or false"}[kind])


def _parse_record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        _reject(where or "the file", value, "an object {...}")
    hints, prefix = get_type_hints(kind), f"{where}." if where else ""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ValueError(f"{prefix}{name} is not a field of this format")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name not in value and (required or name == "schema"):
            raise ValueError(f"{prefix}{name} is missing")
    parsed = {name: _parse(hints[name], entry, f"{prefix}{name}") for name, entry in value.items()}
    try:
        return kind(**parsed)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _reject(where: str, value: Any, expected: str) -> Any:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise ValueError(f"{where} is {shown}, expected {expected}")


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and numbers as JSON has them."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _first_repeated(items: list[Any]) -> Any:
    return next((item for index, item in enumerate(items) if item in items[:index]), None)
