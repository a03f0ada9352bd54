"""A source, a design and data: conversion, calibration, recovery and the record of all three."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from formix.conversion.calibrate import calibrate
from formix.conversion.carry import as_teacher, convert_model
from formix.conversion.objectives import Distillation
from formix.conversion.recover import STAGES, Stage, recover, refuse_stages
from formix.conversion.sentences import load_sentences
from formix.conversion.source import cast
from formix.data import Data, OnBadSample, collate, load_data
from formix.data.text import load_tokenizer
from formix.evaluation.suitable import (
    check_data,
    check_labels,
    check_source,
    image_side,
    normalised_for,
    reads_text,
    tokenizer_for,
)
from formix.training.parallel import start

ERROR_BATCHES = 8  # held-out batches on which the match error is reported
Metric = Callable[[nn.Module], float]


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How the accuracy of a converted model is won back."""

    data: str  # glue:DIR/TASK, text:PATH, folder:PATH, ...; sentences of several places joined by '+'
    # name:budget[:learning rate] with commas; budgets end in s (seconds), steps or epochs; "": calibration alone
    stages: str = "match:240s:5e-4,align:900s:3e-4"
    calibration: int = 8  # batches from which a gain per head is fitted before; 0: none
    labelled: bool = False  # learn from the labels too, in the task stage
    tokenizer: str | None = None  # a transformers directory; None: the source's own
    sequence_length: int = 64  # most tokens of a sentence, or a decoder's window
    batch_size: int = 32  # images or windows per step
    batch_tokens: int = 4096  # of sentences per step, padding included
    img_size: int | None = None  # side that images are scaled to; None: the model's
    held_out: float = 0.01  # share of the sentences on which stages are stopped
    limit: int | None = None  # most samples
    on_bad_sample: OnBadSample = "refuse"  # of images in files: one that cannot be read ends it, or is left out
    evaluations: int = 8  # of a stage, on the held-out part
    patience: int = 3  # evaluations without an improvement before a stage ends
    precision: str = "auto"  # autocast; auto: bfloat16 where it is fast
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("calibration", 0), ("batch_size", 1), ("batch_tokens", 1), ("sequence_length", 1), ("img_size", 1),
            ("limit", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be {least} or more.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be between 0 and 1.")
        parse_stages(self.stages)


def parse_stages(text: str) -> list[tuple[str, float, str, float]]:
    """ "match:240s:5e-4,align:2epochs" as (name, number, unit, learning rate)."""
    parsed, number = [], r"(\d+\.?\d*(?:e[+-]?\d+)?)"
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(rf"(\w+):{number}(s|steps|epochs)(?::{number})?", item)
        if not match or match[1] not in STAGES or float(match[2]) <= 0:
            raise ValueError(
                f"{item!r} is no stage; write NAME:BUDGET or NAME:BUDGET:LEARNING_RATE, the name one of "
                f"{', '.join(STAGES)} and the budget such as 300s, 1000steps or 2epochs."
            )
        parsed.append((match[1], float(match[2]), match[3], float(match[4] or Stage.lr)))
    return parsed


def load_recovery_data(model: Any, recovery: Recovery, source: str | Path | None = None) -> tuple[Data, int]:
    """The data in the form that the model reads, and the samples per step.

    Raises:
        ValueError: words, positions, channels or image sizes that the model does not have.
    """
    check_source(model, recovery.data, "The model", sequence_length=recovery.sequence_length)
    text = reads_text(model)
    if text and recovery.on_bad_sample == "skip":
        raise ValueError("on_bad_sample='skip' is for images in files, and the model reads text; leave it out.")
    size = recovery.batch_size
    if not text:
        data = load_data(
            recovery.data,
            img_size=recovery.img_size or image_side(model),
            seed=recovery.seed,
            limit=recovery.limit,
            on_bad_sample=recovery.on_bad_sample,
            labelled=recovery.labelled,
        )
        data = normalised_for(model, data)
    elif model.can_generate() or recovery.labelled:
        data = load_data(
            recovery.data,
            tokenizer=tokenizer_place(recovery, source),
            sequence_length=recovery.sequence_length,
            seed=recovery.seed,
            limit=recovery.limit,
        )
    else:
        data = load_sentences(
            recovery.data,
            load_tokenizer(tokenizer_place(recovery, source)),
            tokens=recovery.batch_tokens,
            longest=recovery.sequence_length,
            held_out=recovery.held_out,
            seed=recovery.seed,
            limit=recovery.limit,
        )
        size = 1  # of such batches
    check_data(model, data, "The model")
    if recovery.labelled:
        check_labels(model, data, "The model")
    return data, size


def tokenizer_place(recovery: Recovery, source: str | Path | None) -> str:
    """The directory of the tokenizer that text is read with: the one asked for, or the source's own.

    Raises:
        ValueError: neither, or one with other words or numbers than the source's own.
    """
    place = tokenizer_for(source, recovery.tokenizer)
    if place is None:
        raise ValueError("tokenizer is missing; name the directory of the model's own.")
    return place


def run(
    source: nn.Module,
    design: str,
    recovery: Recovery,
    *,
    layers: Sequence[int] | str | None = None,
    keep: str | None = None,
    place: str | Path | None = None,
    state: str | Path | None = None,
    metrics: dict[str, Metric] | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> Any:
    """Convert, calibrate and recover; the result's record has what every step cost and won.

    Args:
        place: where the source was loaded from, for its tokenizer.
        state: a directory for what a killed run needs to go on.
        metrics: measured of the source, and of the model after conversion, calibration and every stage.
    """
    # in float32, whatever the source's type: half precision loses small steps
    home = next(source.parameters())
    wide = (start().device, torch.promote_types(home.dtype, torch.float32))
    teacher = cast(as_teacher(source), *wide)
    torch.manual_seed(recovery.seed)  # of weights that the source does not have
    model = cast(convert_model(source, design, layers=layers, keep=keep), *wide)
    data, batch_size = load_recovery_data(model, recovery, place)
    measured = metrics or {}

    def measure(current: nn.Module) -> dict[str, float]:
        if measured and home.dtype != wide[1]:  # what is left of the weights in their own type
            current = cast(cast(copy.deepcopy(current), wide[0], home.dtype), *wide)
        return {name: metric(current) for name, metric in measured.items()}

    stages = _stages(recovery, math.ceil(len(data.train) / batch_size), batch_size)
    conversion, distillation = model.conversion, Distillation(teacher, model, data, recovery.labelled)
    refuse_stages(model, distillation, stages)

    def match_error(step: str) -> None:
        held_out = DataLoader(data.validation, batch_size=batch_size, collate_fn=collate)
        conversion.match_errors[step] = distillation.mean_errors(model, itertools.islice(held_out, ERROR_BATCHES))

    conversion.match_parts = distillation.parts
    match_error("converted")
    conversion.metrics = {"source": measure(teacher), "converted": measure(model)}
    if recovery.calibration:
        batches = calibration_batches(data, batch_size, recovery.seed)
        calibrate(model, teacher, itertools.islice(batches, recovery.calibration))
        conversion.metrics["calibrated"] = measure(model)
        match_error("calibrated")
    records = recover(
        model,
        teacher,
        data,
        stages,
        labelled=recovery.labelled,
        state=state,
        settings={k: v for k, v in dataclasses.asdict(recovery).items() if k not in ("data", "tokenizer")},
        seed=recovery.seed,
        metric=measure if measured else None,
        on_progress=on_progress,
    )
    if stages:
        match_error("recovered")
    for record in records:
        if record["trained"] and "metric" in record:
            conversion.metrics[record["stage"]] = record["metric"]
    cast(model, home.device, home.dtype)
    if not records:
        conversion.note_folded(model)
    return model


def calibration_batches(data: Data, batch_size: int, seed: int) -> DataLoader:
    """Batches of train in an order that the seed alone decides."""
    order = torch.Generator().manual_seed(seed)
    return DataLoader(data.train, batch_size=batch_size, collate_fn=collate, shuffle=True, generator=order)


def _stages(recovery: Recovery, steps_per_epoch: int, batch_size: int) -> list[Stage]:
    return [
        Stage(
            name=name,
            lr=lr,
            seconds=number if unit == "s" else None,
            epochs={"s": None, "steps": number / steps_per_epoch, "epochs": number}[unit],
            batch_size=batch_size,
            evaluations=recovery.evaluations,
            patience=recovery.patience,
            precision=recovery.precision,
        )
        for name, number, unit, lr in parse_stages(recovery.stages)
    ]
