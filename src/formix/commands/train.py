"""`formix train`: one model, trained until it is done, however often it is interrupted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formix.commands.arguments import names, parse_several, split_one

if TYPE_CHECKING:
    from formix.data import Data
    from formix.training import Step, TrainConfig
    from formix.training.job import JobConfig

PROBE = 32  # validation samples that diagnostics are made on


def train(arguments: list[str]) -> int:
    """Train a model from a recipe or YAML file; started again, it goes on from where it was."""
    import torch
    from accelerate.utils import set_seed
    from rich.console import Console

    from formix.comparison.models import build_model
    from formix.data.augmentation import augmented
    from formix.training import Checkpoints, evaluate, task_objective
    from formix.training import train as run
    from formix.training.diagnostics import diagnose
    from formix.training.inputs import describe_data, save_with_inputs
    from formix.training.job import DiagnosticsFile, MetricsFile, OutputDirectory, combined
    from formix.training.parallel import joined, process_count, together
    from formix.training.plan import plan
    from formix.training.trackers import Trackers

    job, training = _configs(arguments)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    out = OutputDirectory(job.out)
    data = job.load_data()
    objective = task_objective(data, training.label_smoothing, training.loss)  # which may refuse: nothing is there yet
    augmented(data, training.augmentation, training.seed)  # and so may this
    set_seed(training.seed)
    model = build_model(data, job.model, job.model_args, job.design)
    describe_data(model, data, training.loss)
    if job.plan:
        with joined() as accelerator:
            if process_count()[0] == 0:
                print(plan(model, data, training, accelerator.device))
        return 0
    with contextlib.ExitStack() as at_end:
        at_end.enter_context(joined())
        first = process_count()[0] == 0
        if job.diagnostics and job.parallel == "fsdp" and process_count()[1] > 1:
            raise ValueError("diagnostics look into a whole model, and parallel=fsdp divides it; use --parallel=ddp.")
        checkpoints = Checkpoints(
            out.checkpoints,
            keep=job.keep,
            minutes=job.save_minutes,
            steps=job.save_steps,
            identity=job.identity(data),
            write_model=lambda model, directory: save_with_inputs(model, directory, data),
        )
        at_end.callback(out.release)
        together(lambda: out.claim(combined(job, training)), first_only=True, otherwise=f"{out.path} cannot be used")
        metrics, diagnostics = MetricsFile(out.metrics, job.log_steps), DiagnosticsFile(out.diagnostics)
        probe = data.validation.__getitems__(range(min(PROBE, len(data.validation))))
        trackers = Trackers(names(job.trackers, "trackers", empty=True), out.path, combined(job, training))
        at_end.callback(trackers.finish)  # also of a run that a signal or a divergence ends
        with _display(training, data) if first else contextlib.nullcontext(lambda step: None) as show:

            def on_step(step: Step) -> None:
                metrics.add(step)
                diagnostics.reach(step.step)
                figures = _figures(step)
                if job.diagnostics and step.point:
                    layers = diagnose(model, probe)
                    diagnostics.add(step.step, layers)
                    figures |= layers
                if job.trackers and (step.point or step.step % job.log_steps == 0):
                    trackers.log(figures, step.step)
                show(step)

            result = run(
                model,
                data,
                training,
                objective=objective,
                checkpoints=checkpoints,
                parallel=job.parallel,
                workers=job.workers,
                on_step=on_step,
            )
        latest = checkpoints.latest
        if result.diverged:
            where = f"{latest} is the last checkpoint before it" if latest else "there is no checkpoint before it"
            rewind = ", or use --on-divergence=rewind" if training.on_divergence == "stop" else ""
            raise ValueError(f"The run diverged: {result.diverged}; {where}. Lower --lr{rewind}.")
        test = evaluate(model, data, "test")
        if first:
            assert latest is not None
            record = {"metric": data.metric, "validation": result.validation, "test": test, "chance": data.chance}
            skipped = data.provenance.get("skipped", {})
            out.finish(latest, {**record, "seconds": result.seconds, "samples": result.samples, "skipped": skipped})
            console = Console(markup=False)
            console.print(
                f"{data.metric}: validation {result.validation:.4f}, test {test:.4f}, chance {data.chance:.4f}"
            )
            if count := sum(skipped.values()):
                console.print(f"Samples that could not be read and were left out: {count}")
            console.print(f"Model: {out.model}", soft_wrap=True)
    return 0


def _configs(arguments: list[str]) -> tuple[JobConfig, TrainConfig]:
    """The two halves of the configuration, out of a recipe's name or a YAML file, and flags."""
    from formix.training import TrainConfig
    from formix.training.job import JobConfig
    from formix.training.recipes import recipe_path

    named, flags = split_one("train", arguments, JobConfig, TrainConfig)
    if named is not None:
        path = Path(named) if named.endswith((".yaml", ".yml")) else recipe_path(named)
        if not path.is_file():
            raise ValueError(f"{path} is no file; give the YAML of a run, or a recipe's name.")
        flags = ["--config", str(path), *flags]
    job, training = parse_several([JobConfig, TrainConfig], "train", flags)
    return job, training


def _figures(step: Step) -> dict[str, float]:
    figures = {"loss": step.loss, "lr": step.lr, "epoch": step.epoch, "samples_per_second": step.samples / step.seconds}
    return figures | ({"validation": step.point.validation} if step.point else {})


@contextlib.contextmanager
def _display(training: TrainConfig, data: Data) -> Iterator[Callable[[Step], None]]:
    """A bar with loss, validation, speed and time left, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    per_sample, unit = (data.sequence_length, "tokens") if data.task in ("causal-lm", "masked-lm") else (1, "samples")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("starting", total=1.0)
    skipped = sum(data.provenance.get("skipped", {}).values())
    left_out = f", {skipped} unreadable left out" if skipped else ""
    state: dict[str, Any] = {"shown": 0.0, "validation": "", "begin": None}

    def show(step: Step) -> None:
        if state["begin"] is None:
            bar.start()  # only now: before the first step a wrong argument may still end everything in one sentence
            state["begin"] = step
        if step.point is not None:
            state["validation"] = f", {data.metric} {step.point.validation:.4f}"
        if (now := time.monotonic()) - state["shown"] < 0.2 and step.point is None:
            return
        state["shown"] = now
        begin = state["begin"]
        spent = max(step.seconds - begin.seconds, 1e-9)
        speed = (step.samples - begin.samples) * (per_sample or 1) / spent
        text = f"epoch {step.epoch:.1f}, loss {step.loss:.4f}{state['validation']}, {speed:,.0f} {unit}/s{left_out}"
        bar.update(task, description=text, completed=step.progress)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
