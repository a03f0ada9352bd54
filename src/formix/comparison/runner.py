"""The main job: the same data, budget and seeds for every design."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from filelock import FileLock, Timeout

from formix.comparison.config import CompareConfig
from formix.comparison.measure import flops_per_item, latencies, step_memory, training_speeds
from formix.comparison.models import build_model, default_model
from formix.comparison.results import (
    CurvePoint,
    DesignRecord,
    Results,
    RunRecord,
    Task,
    read_run,
    write_csv,
    write_results,
    write_run,
)
from formix.comparison.statistics import choose_learning_rate
from formix.data import Data
from formix.design import design as find_design
from formix.environment import capture_environment
from formix.records import write_atomically
from formix.training import Objective, Step, evaluate, task_objective, train
from formix.training.acceleration import computed_in
from formix.training.job import LOCK, is_free
from formix.training.parallel import start

_log = logging.getLogger("formix")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a comparison is, for a display."""

    run: int  # number of this run, from 1
    runs: int  # how many there are
    label: str  # what is running
    share: float  # of this run that is done


def compare(config: CompareConfig, on_progress: Callable[[Progress], None] | None = None) -> Results:
    """Train every design with every seed and write results.json, results.csv and one file per finished run.

    Runs that the output directory holds already are not repeated; it must be of the same configuration.

    Raises:
        ValueError: wrong configuration or data, an output directory of another comparison, or no design that can do
            the task.
    """
    out = Path(config.out)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = config.load_data()
    objective = task_objective(data, config.label_smoothing)
    designs = _check_designs(config, data)
    with _claimed(out, config, data):
        return _compare(config, data, objective, designs, out, on_progress)


def _compare(
    config: CompareConfig,
    data: Data,
    objective: Objective,
    designs: Sequence[DesignRecord],
    out: Path,
    on_progress: Callable[[Progress], None] | None,
) -> Results:
    """`compare` in a directory that is its own."""
    able = [record.design for record in designs if record.refused is None]
    total = _count(config, able)
    job = _Job(config=config, data=data, objective=objective, out=out, total=total, on_progress=on_progress)

    first: dict[tuple[str, float], RunRecord] = {}
    for name in able:
        for lr in config.learning_rates:
            first[name, lr] = job.run(name, lr, seed=0)
    chosen = {
        name: choose_learning_rate([first[name, lr] for lr in config.learning_rates], data.higher_is_better)
        for name in able
    }
    runs = list(first.values())
    for seed in range(1, config.seeds):
        for name in able:
            # a design that diverged at every rate is still run with every seed, so that this is seen to be no accident
            runs.append(job.run(name, chosen[name] or config.learning_rates[0], seed))
    runs = [_marked(run, chosen[run.design]) for run in runs]
    if config.latency:
        runs = _with_times(runs, config, data, able)
    results = Results(
        command=shlex.join(["formix", *sys.argv[1:]]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=capture_environment(),
        config=dataclasses.asdict(config),
        task=_task(config, data),
        designs=tuple(designs),
        runs=tuple(runs),
    )
    write_results(results, out / "results.json")
    write_csv(results, out / "results.csv")
    return results


@dataclass(kw_only=True)
class _Job:
    """One comparison under way."""

    config: CompareConfig
    data: Data
    objective: Objective
    out: Path
    total: int
    on_progress: Callable[[Progress], None] | None
    done: int = 0

    def run(self, name: str, lr: float, seed: int) -> RunRecord:
        """Train and evaluate one design, unless that run is on disk already."""
        key = _hash({"config": _defining(self.config), "design": name, "lr": lr, "seed": seed})
        path = self.out / "runs" / f"{key}.json"
        self.done += 1
        if path.is_file():
            return read_run(path)
        training = self.config.training(lr, seed)
        set_seed(seed)
        model = build_model(self.data, self.config.model, self.config.model_args, name).to(start().device)
        part = math.ceil(self.config.batch_size / self.config.accumulation)
        memory = step_memory(model, self.data, part, training.precision)
        flops = flops_per_item(model, self.data)
        label = f"{name}, seed {seed}, lr {lr:g}"
        report = None
        if self.on_progress is not None:
            display, number = self.on_progress, self.done

            def report(step: Step) -> None:
                display(Progress(run=number, runs=self.total, label=label, share=step.progress))

        result = train(model, self.data, training, objective=self.objective, on_step=report)
        record = RunRecord(
            design=name,
            seed=seed,
            lr=lr,
            status="diverged" if result.diverged else "ok",
            message=result.diverged,
            validation=result.validation,
            test=None if result.diverged else evaluate(model, self.data, "test"),
            curve=tuple(CurvePoint(**dataclasses.asdict(point)) for point in result.curve),
            parameters=sum(p.numel() for p in model.parameters()),
            flops=flops,
            train_items_per_second=result.samples / result.seconds,
            train_seconds=result.seconds,
            peak_memory_bytes=memory,
            config_hash=key,
        )
        write_run(record, path)
        return record


def _marked(run: RunRecord, chosen: float | None) -> RunRecord:
    """The run as results hold it: the test metric of a learning rate that was not chosen is not looked at."""
    selected = chosen is not None and run.lr == chosen
    return replace(run, selected=selected, test=run.test if selected else None)


def _check_designs(config: CompareConfig, data: Data) -> list[DesignRecord]:
    """Every design with its definition, and for those that cannot do the task the reason."""
    records, reasons = [], []
    for name in config.design_names:
        chosen = find_design(name)
        refused = None
        try:
            build_model(data, config.model, config.model_args, name)
        except ValueError as error:
            refused = str(error)
            reasons.append(refused)
        records.append(
            DesignRecord(design=name, description=chosen.describe(), definition=chosen.to_dict(), refused=refused)
        )
    if len(reasons) == len(records):
        try:
            build_model(data, config.model, config.model_args, "softmax")
        except ValueError as error:
            if str(error) in reasons:
                raise  # what no design changes is of the settings
        raise ValueError(f"None of the designs can do {config.data}: {reasons[0]}")
    return records


def _with_times(runs: Sequence[RunRecord], config: CompareConfig, data: Data, names: Iterable[str]) -> list[RunRecord]:
    """How long inference and training take depends on the design and not on the weights, so it is measured once for all
    runs of a design, the designs in turn: the runs themselves lie minutes apart, in which a machine's speed changes."""
    set_seed(0)
    place = start().device

    def build_there(name: str) -> Any:
        return build_model(data, config.model, config.model_args, name).to(place)

    build = {name: functools.partial(build_there, name) for name in names}
    speeds = training_speeds(build, data, config.training(config.learning_rates[0], seed=0))
    measured = latencies({name: make() for name, make in build.items()}, data)
    return [replace(run, latency_ms=measured[run.design], train_items_per_second=speeds[run.design]) for run in runs]


def _count(config: CompareConfig, able: Sequence[str]) -> int:
    return len(able) * (len(config.learning_rates) + config.seeds - 1)


def _task(config: CompareConfig, data: Data) -> Task:
    name, arguments = default_model(data)
    if config.model is not None and config.model != name:
        name, arguments = config.model, {}
    sizes = ", ".join(f"{k}={v}" for k, v in {**arguments, **config.model_args}.items())
    return Task(
        data=config.data,
        kind=data.task,
        metric=data.metric,
        higher_is_better=data.higher_is_better,
        chance=data.chance,
        baselines=data.baselines,
        splits={split: len(getattr(data, split)) for split in ("train", "validation", "test")},
        model=f"{name} ({sizes})" if sizes else name,
        provenance="; ".join(f"{k}: {v}" for k, v in data.provenance.items()),
    )


def _defining(config: CompareConfig) -> dict[str, Any]:
    """The fields that decide a run's outcome; the others may change between two starts of the same comparison."""
    fields = dataclasses.asdict(config)
    for name in ("designs", "seeds", "lrs", "out", "latency", "on_bad_sample"):  # the data's hash has what is left out
        fields.pop(name)
    if config.task is None:
        fields.pop("mask_probability")
    return fields | {"precision": computed_in(config.precision)}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _contents(model: Path) -> str:
    """SHA-256 of the config and the weights that every run begins with."""
    digest = hashlib.sha256()
    for path in (model / "config.json", *sorted(model.glob("*.safetensors"))):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextlib.contextmanager
def _claimed(out: Path, config: CompareConfig, data: Data) -> Iterator[None]:
    """The directory is this comparison's, and this process's until the end; one that is another's is refused."""
    defining = _defining(config) | {f"contents of {config.contents}": data.provenance.get("sha256")}
    if config.model is not None and Path(config.model).is_dir():
        defining["contents of model"] = _contents(Path(config.model))
    path, mine = out / "config.json", {"defining": defining, "config": dataclasses.asdict(config)}
    if path.is_file():
        try:
            saved = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"{path} is damaged; remove {out} or choose another directory with --out.") from None
        theirs = saved.get("defining") if isinstance(saved, dict) else None
        if not isinstance(theirs, dict):  # the config of a model, or of a training run
            raise _foreign(out)
        changed = sorted(k for k in mine["defining"] if theirs.get(k) != mine["defining"][k])
        if changed:
            raise ValueError(
                f"{out} holds a comparison with another {', '.join(changed)}; remove it or choose another --out."
            )
    elif out.exists() and not is_free(out):
        raise _foreign(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another formix compare is under way in {out}, and two would spoil each other's times; wait for it, or "
            "choose another --out."
        ) from None
    try:
        write_atomically(path, json.dumps(mine, indent=2) + "\n")
        yield
    finally:
        lock.release()


def _foreign(out: Path) -> ValueError:
    return ValueError(f"{out} exists and is no comparison of formix's; choose another directory with --out.")
