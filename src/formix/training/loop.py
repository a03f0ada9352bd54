"""The training loop, for every task, on one process or many."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import signal
import statistics
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import nn

from formix.data import Batch, Data
from formix.data.augmentation import augmented
from formix.training.acceleration import autocast_dtype, computed_in, recompute_activations
from formix.training.checkpoint import Checkpoints
from formix.training.clock import Clock
from formix.training.config import TrainConfig
from formix.training.ema import Ema
from formix.training.optimizers import make_optimizer, set_learning_rate
from formix.training.order import BatchOrder, naming_killed_workers
from formix.training.parallel import (
    Parallel,
    distribute,
    follow_first,
    from_first,
    gathered,
    local,
    process_count,
    start,
    summed,
    synchronised,
    whole,
)
from formix.training.progress import Place, Point, Step, TrainResult
from formix.training.signals import Interrupted, SignalBox, collected_signals
from formix.training.state import (
    export,
    make_optimizer_state,
    make_skeleton,
    named_tensors,
    random_states,
    set_random_states,
)
from formix.training.tasks import Objective, task_objective

_log = logging.getLogger("formix")
STEPS_PER_LOOK = 16  # on accelerators, where looking at a loss waits for it; on a CPU every step is looked at
REWINDS = 3  # returns to a checkpoint before a run that diverges again is ended
FOREIGN = (KeyError, TypeError, AttributeError, RuntimeError, UnicodeError, JSONDecodeError, SafetensorError)
RECENT = 32  # losses whose median a spike is measured by
HARMLESS = ("compile", "activation_checkpointing", "spike", "on_divergence")  # may differ when a run goes on


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    objective: Objective | None = None,
    checkpoints: Checkpoints | None = None,
    parallel: Parallel = "ddp",
    workers: int = 0,
    on_step: Callable[[Step], None] | None = None,
) -> TrainResult:
    """Train `model` in place; with `ema`, its weights are at the end the moving average, which is what is evaluated.

    The order of batches and their augmentation depend on the seed alone, so models compared under one seed see the same
    batches, and so does any number of processes: a batch is divided among those that torchrun or accelerate launch
    started. Mixup and cutmix do depend on their number and on `accumulation`, since they mix the images that a process
    has at once; so does BatchNorm, see `formix.training.parallel.distribute`. On the CPU the same seed twice gives the
    same weights to the last bit (with a budget in epochs).

    Args:
        objective: the loss of a batch and the metric of the curve; None: those of the data's task.
        checkpoints: where to keep the state. A run that finds an intact one there goes on from it, on the CPU to the
            same weights as if it had never stopped; SIGTERM and SIGINT then save before they end it.
        parallel: with several processes, copies of the model (ddp) or shards of it (fsdp).
        workers: processes that load data; 0: this one.
        on_step: called on the first process after every step, later and several at a time on accelerators.

    Returns:
        The learning curve. A loss that is no finite number, or above `spike`, returns the run to its last checkpoint or
        ends it (`on_divergence`), which is said in `diverged`.

    Raises:
        ValueError: checkpoints of another run, damaged ones alone, or one that cannot be written; data that cannot be
            read, or a process that loads it killed.
        Interrupted: a signal ended the run; its state is saved.
    """
    run = _Run(model, data, config, objective, checkpoints, parallel, workers)
    with naming_killed_workers(), collected_signals() if checkpoints else contextlib.nullcontext(SignalBox()) as box:
        return run.go(box, on_step or (lambda step: None))


class _Run:
    """A run under way. What changes from step to step is in `tensors` and `document`."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        config: TrainConfig,
        objective: Objective | None,
        checkpoints: Checkpoints | None,
        parallel: Parallel,
        workers: int,
    ) -> None:
        self.config, self.checkpoints, self.workers = config, checkpoints, workers
        self.objective = objective or task_objective(data, config.label_smoothing, config.loss)
        self.device = start().device
        self.process, self.processes = process_count()
        if len(set(gathered(data.provenance.get("sha256")))) > 1:
            raise ValueError(
                f"The processes of this run read different data as {data.name!r}; give all the same files."
            )
        set_seed(config.seed + self.process)  # for dropout, which differs between processes
        self.dtype = autocast_dtype(config.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if config.activation_checkpointing:
            recompute_activations(model)
        if config.compile:
            model.compile()
        self.skeleton = make_skeleton(model) if parallel == "fsdp" and self.processes > 1 and checkpoints else None
        self.model = distribute(model, parallel, self.device)
        self.whole = whole(self.model)
        self.optimizer = make_optimizer(self.whole, config)
        self.ema = Ema(self.whole, config.ema) if config.ema else None
        self.order = BatchOrder(
            augmented(data, config.augmentation, config.seed).train,
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            seed=config.seed,
            process=self.process,
            processes=self.processes,
        )
        steps = self.order.steps_per_epoch
        self.total = math.inf if config.epochs is None else max(1, round(config.epochs * steps))
        self.clock, self.place, self.result = Clock(), Place(), TrainResult()
        self.pending: list[tuple[Step, torch.Tensor]] = []  # steps whose losses were not looked at yet
        self.rewound: Path | None = None  # the checkpoint that the run last returned to
        self.look_every = 1 if self.device.type == "cpu" else STEPS_PER_LOOK

    def go(self, box: SignalBox, on_step: Callable[[Step], None]) -> TrainResult:
        if self.checkpoints is not None:
            self._resume(self.checkpoints)
        batches = self._batches()
        self.model.train()
        progress = self._progress()
        while progress < 1:
            self._step(batches, progress)
            progress = self._progress()  # once: a budget spent before a second look would end without an evaluation
            evaluate = progress >= min(1, self.place.due / self.config.evaluations)
            if not evaluate and self.place.step % self.look_every:
                continue
            steps, stop, save = self._look(box, progress)
            if self.result.diverged is None and (evaluate or save or stop):
                self.result.diverged = self._judge_weights()
            if self.result.diverged is not None:
                if not self._rewind():
                    break
                batches, progress = self._batches(), self._progress()
                continue
            if evaluate:
                steps[-1] = dataclasses.replace(steps[-1], point=self._evaluate(progress))
            if self.process == 0:
                for step in steps:
                    on_step(step)
            if self.checkpoints is not None and (save or stop or evaluate):
                self._save(self.checkpoints)
            if stop:
                assert self.checkpoints is not None
                raise Interrupted(stop, f"{self.checkpoints.latest} holds its state")
        self.result.seconds = self.clock.seconds
        if self.ema is not None:
            self.ema.copy_to(self.whole)
        return self.result

    def _progress(self) -> float:
        if self.config.seconds is None:
            return self.place.step / self.total
        return from_first(self.clock.seconds) / self.config.seconds

    def _batches(self) -> Iterator[Batch]:
        return self.order.batches(self.place.epoch, self.place.batch, workers=self.workers)

    def _step(self, batches: Iterator[Batch], progress: float) -> None:
        """One step of the optimiser on the next batch."""
        config, place = self.config, self.place
        factor = config.lr_factor(progress if config.seconds else (place.step + 0.5) / self.total)
        set_learning_rate(self.optimizer, config.lr * factor)
        weights = self.order.weights(place.batch)
        total: Any = 0.0
        for number, weight in enumerate(weights, start=1):
            batch = {k: v.to(self.device, non_blocking=True) for k, v in next(batches).items()}
            with synchronised(self.model, last=number == len(weights)):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    loss = self.objective.loss(self.model, batch)
                loss = loss * weight if weight != 1 else loss
                self.scaler.scale(loss).backward()
            total = total + loss.detach()
        self.scaler.unscale_(self.optimizer)
        if config.clip:
            nn.utils.clip_grad_norm_(self.whole.parameters(), config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.whole)
        self.result.samples += self.order.samples(place.batch)
        place.step, place.batch = place.step + 1, place.batch + 1
        if place.batch == self.order.steps_per_epoch:
            place.epoch, place.batch = place.epoch + 1, 0
        done = Step(
            step=place.step,
            epoch=place.epoch + place.batch / self.order.steps_per_epoch,
            progress=math.nan,  # this and the loss are known after `_look`
            loss=math.nan,
            lr=config.lr * factor,
            seconds=self.clock.seconds,
            samples=self.result.samples,
        )
        self.pending.append((done, total))

    def _look(self, box: SignalBox, progress: float) -> tuple[list[Step], int, bool]:
        """The last steps with their losses; the signal to stop for, and whether to save: agreed by all processes."""
        save = self.checkpoints is not None and self.process == 0 and self.checkpoints.due(self.place.step)
        flags = [box.received == signal.SIGTERM, box.received == signal.SIGINT, save]
        losses = torch.stack([loss.float() / self.processes for _, loss in self.pending])
        values = summed(torch.cat([losses, torch.tensor(flags, dtype=torch.float32, device=self.device)])).tolist()
        steps = []
        for (step, _), loss in zip(self.pending, values[:-3], strict=True):
            steps.append(dataclasses.replace(step, loss=loss, progress=min(1.0, progress)))
            self.result.diverged = self._judge(steps[-1])
            if self.result.diverged is not None:
                break
        self.pending.clear()
        terminated, interrupted, save = (value > 0 for value in values[-3:])
        return steps, signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0, save

    def _judge(self, step: Step) -> str | None:
        """Take in a loss; what is wrong with it, in words."""
        recent, spike = self.place.recent, self.config.spike
        if not math.isfinite(step.loss):
            return f"the loss became {step.loss} at step {step.step} with learning rate {self.config.lr:g}"
        if spike and len(recent) == RECENT and step.loss > spike * (median := statistics.median(recent)):
            return f"the loss rose to {step.loss:g} at step {step.step}, more than {spike:g} x the {median:g} before"
        self.place.recent = [*recent[1 - RECENT :], step.loss]
        self.place.loss_sum += step.loss
        self.place.loss_count += 1
        return None

    def _judge_weights(self) -> str | None:
        """What is wrong with weights that are to be measured or written: the loss of the last step came before them."""
        named = list(self.whole.named_parameters())
        broken = torch.stack([(~local(p.detach()).isfinite()).any() for _, p in named]).float()
        for (name, _), processes in zip(named, summed(broken).tolist(), strict=True):
            if processes:
                return (
                    f"the weights are not finite after step {self.place.step} with learning rate {self.config.lr:g} "
                    f"({name} is the first)"
                )
        return None

    def _evaluate(self, progress: float) -> Point:
        with self.clock:
            follow_first(self._statistics())
            with self.ema.applied(self.whole) if self.ema is not None else contextlib.nullcontext():
                metric = self.objective.metric(self.whole)
            place = self.place
            point = Point(
                step=place.step,
                epoch=place.step / self.order.steps_per_epoch,
                seconds=self.clock.seconds,
                train_loss=place.loss_sum / place.loss_count,
                validation=metric,
            )
            place.loss_sum, place.loss_count = 0.0, 0
            place.due = math.floor(progress * self.config.evaluations) + 1
            self.result.curve.append(point)
        return point

    def _statistics(self) -> Iterator[torch.Tensor]:
        """BatchNorm's, and their averages: of a process's own samples, while the first one's are saved."""
        averages = self.ema.weights if self.ema is not None else {}
        for name, buffer in self.whole.named_buffers():
            if buffer.is_floating_point():
                yield buffer
                if name in averages:
                    yield averages[name]

    def _save(self, checkpoints: Checkpoints) -> None:
        with self.clock:
            self.result.seconds = self.clock.seconds
            curve = self.result.curve
            state = {
                "identity": checkpoints.identity,
                "processes": self.processes,
                "place": dataclasses.asdict(self.place),
                "result": dataclasses.asdict(self.result),
                "scaler": self.scaler.state_dict(),
                "ema_steps": self.ema.steps if self.ema is not None else 0,
                "validation": curve[-1].validation if curve and curve[-1].step == self.place.step else None,
                "higher_is_better": self.objective.higher_is_better,
            }
            tensors = named_tensors(self.whole, self.optimizer, self.ema)
            checkpoints.write(self.place.step, state, random_states(), tensors, self._export)

    def _export(self, directory: Path) -> None:
        assert self.checkpoints is not None
        write = self.checkpoints.write_model
        with self.ema.applied(self.whole) if self.ema is not None else contextlib.nullcontext():
            export(self.whole, self.skeleton, lambda model: write(model, directory))

    def _resume(self, checkpoints: Checkpoints) -> None:
        """Go on from the newest checkpoint, if there is one."""
        kept = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in HARMLESS}
        kept["precision"] = computed_in(self.config.precision)
        checkpoints.identity = json.loads(json.dumps({**checkpoints.identity, **kept}))
        if (path := checkpoints.open()) is not None:
            self._restore(checkpoints, path)

    def _restore(self, checkpoints: Checkpoints, path: Path) -> None:
        try:
            state, random = checkpoints.read_state(path)
            stored = checkpoints.stored_tensors(path)
            curve = [Point(**point) for point in state["result"].pop("curve")]
            self.place, self.result = Place(**state["place"]), TrainResult(curve=curve, **state["result"])
            self.scaler.load_state_dict(state["scaler"])
            if self.ema is not None:
                self.ema.steps = int(state["ema_steps"])
        except FOREIGN as error:
            raise ValueError(f"{path} holds no state of such a run ({' '.join(str(error).split())}).") from None
        make_optimizer_state(self.whole, self.optimizer, stored)
        checkpoints.read_tensors(path, named_tensors(self.whole, self.optimizer, self.ema))
        self.clock.set(self.result.seconds)
        if random is not None:
            set_random_states(random)
        else:  # another number of processes
            set_seed(self.config.seed + self.process + self.processes * self.place.step)
        _log.info("going on from %s", path)

    def _rewind(self) -> bool:
        """After a divergence: return to the last checkpoint, and go on from there with the data that come now.

        If that is the one it returned to before, whose weights may be what is wrong, it returns to the one before it.
        """
        checkpoints, reason = self.checkpoints, self.result.diverged
        rewinds, epoch, batch = self.result.rewinds + 1, self.place.epoch, self.place.batch
        if (
            self.config.on_divergence == "stop"
            or checkpoints is None
            or checkpoints.latest is None
            or rewinds > REWINDS
        ):
            return False
        if checkpoints.latest == self.rewound:
            checkpoints.retreat()
        self.rewound = checkpoints.latest
        self._restore(checkpoints, checkpoints.latest)
        self.place.epoch, self.place.batch, self.result.rewinds = epoch, batch, rewinds
        _log.warning("%s: back to %s, without the data that led there.", reason, checkpoints.latest)
        return True
