"""Which layers to convert: those whose replacement hurts least come first.

Every layer is converted alone and calibrated; its cost is the end-to-end loss to the teacher (stage align) on held-out
batches. In the order of these costs layers are then converted one more at a time, which gives the curve of their number
against loss, metric and latency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from formix.benchmarks import interleaved_medians
from formix.conversion.calibrate import calibrate
from formix.conversion.carry import as_teacher, convert_model
from formix.conversion.objectives import Distillation
from formix.conversion.taps import answer, moved
from formix.data import Batch
from formix.design import Design


@dataclass(frozen=True, kw_only=True)
class Converted:
    """One point of the curve."""

    layers: list[int]  # that are converted
    loss: float  # to the teacher, end to end, without recovery
    milliseconds: float  # of a forward pass on the first batch
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search found."""

    costs: list[float]  # of converting each layer alone
    curve: list[Converted]  # with 0, 1, 2, ... layers, those of the lowest cost first
    chosen: list[int]  # layers within the budget

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = ["layers  loss      ms        metrics"]
        for point in self.curve:
            metrics = "  ".join(f"{name} {value:.4f}" for name, value in point.metrics.items())
            lines.append(f"{len(point.layers):>6}  {point.loss:<8.4f}  {point.milliseconds:<8.2f}  {metrics}")
        return "\n".join([*lines, f"chosen: layers {', '.join(map(str, self.chosen)) or 'none'}"])


def search(
    source: nn.Module,
    design: str | Design,
    batches: Sequence[Batch],
    *,
    most: int,
    max_loss: float | None = None,
    max_milliseconds: float | None = None,
    metrics: dict[str, Callable[[nn.Module], float]] | None = None,
) -> Search:
    """Convert up to `most` layers, those that hurt least first.

    Args:
        batches: the first half calibrates, the rest is held out.
        max_loss: an accuracy budget: stop before the loss to the teacher exceeds it.
        max_milliseconds: a latency budget: stop as soon as a forward pass takes no longer.
        metrics: measured at every point of the curve.

    Raises:
        ValueError: fewer than two batches, or a budget that no number of layers keeps.
    """
    if len(batches) < 2:
        raise ValueError(
            f"A search needs two batches or more, one to calibrate and one held out; it has {len(batches)}."
        )
    teacher = as_teacher(source)
    depth = len(Distillation(teacher, teacher, None, False).layers)
    if not 1 <= most <= depth:
        raise ValueError(f"The search is to convert {most} layers; the model has {depth}.")
    fit, held = batches[: len(batches) // 2], batches[len(batches) // 2 :]

    def converted(numbers: Sequence[int]) -> nn.Module:
        if not numbers:
            return teacher
        model = convert_model(source, design, layers=list(numbers))
        calibrate(model, teacher, fit)
        return model

    def point(numbers: Sequence[int]) -> Converted:
        model = converted(numbers)
        return Converted(
            layers=sorted(numbers),
            loss=_loss(teacher, model, held),
            milliseconds=_milliseconds(model, held[0]),
            metrics={name: metric(model) for name, metric in (metrics or {}).items()},
        )

    costs = [_loss(teacher, converted([layer]), held) for layer in range(depth)]
    order = sorted(range(depth), key=costs.__getitem__)
    curve = [point([])]
    for number in range(1, most + 1):
        if max_milliseconds is not None and curve[-1].milliseconds <= max_milliseconds:
            break
        curve.append(point(order[:number]))
        if max_loss is not None and curve[-1].loss > max_loss:
            break
    within = [p for p in curve if max_loss is None or p.loss <= max_loss]
    if max_milliseconds is not None:
        within = [p for p in within if p.milliseconds <= max_milliseconds]
        if not within:
            raise ValueError(
                f"No number of layers up to {most} takes {max_milliseconds:g} ms or less"
                + ("." if max_loss is None else f" with a loss of {max_loss:g} or less.")
            )
    return Search(costs=costs, curve=curve, chosen=within[-1].layers if within else [])


@torch.no_grad()
def _loss(teacher: nn.Module, model: nn.Module, batches: Sequence[Batch]) -> float:
    distillation = Distillation(teacher, model, None, False)
    return sum(float(distillation.align(model, moved(batch, model))) for batch in batches) / len(batches)


def _milliseconds(model: nn.Module, batch: Batch) -> float:
    given = moved(batch, model)

    @torch.inference_mode()
    def call() -> None:
        answer(model, given)

    return 1e3 * interleaved_medians({"model": call}, repeats=5, seconds=2.0)["model"]
