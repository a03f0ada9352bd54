"""The losses of the three stages of recovery, each for formix's one training loop.

match   every changed layer alone, fed with the teacher's own input of that layer:
            |A_s - A_t|^2 / |A_t|^2  where the mixer or its keys changed (A: the mixer's branch), and
            |Y_s - Y_t|^2 / |Y_t - X|^2  where the layout changed (Y: the layer's output, X: its input)
align   end to end: hidden states |Y_s - Y_t|^2 / var(Y_t) of all layers and the tokens behind the last norm, pooled
        features 1 - cos(p_s, p_t), and the cosines between the samples of a batch, (cos_s - cos_t)^2
task    KL(teacher | student) of the classes that the logits are of, or (y_s - y_t)^2 of a single score, the pooled
        features, and the task's own loss where there are labels
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formix.conversion.taps import Answer, Flow, answer, moved, tapped
from formix.data import Batch, Data
from formix.models.inputs import independent_classes
from formix.models.parts import Layer, layers
from formix.training.tasks import loss_of

RELATIONS = 10.0  # weight of the cosines between samples: their squares are small


class Distillation:
    """A teacher (`as_teacher`) and the losses that lead a student of formix's to it."""

    def __init__(self, teacher: nn.Module, student: nn.Module, data: Data | None, labelled: bool) -> None:
        teacher.to(next(student.parameters()).device)
        self.teacher, self.data, self.labelled = teacher.eval().requires_grad_(False), data, labelled
        self.teacher_layers, self.layers = layers(teacher), layers(student)
        self.changed = [_changes(t, s) for t, s in zip(self.teacher_layers, self.layers, strict=True)]

    def match(self, model: Any, batch: Batch) -> Tensor:
        flow, _ = self._taught(batch)
        model.eval()  # no dropout: the teacher has none
        with tapped(self.layers, forced=flow.inputs) as own:
            answer(model, batch)
        return torch.stack(self.errors(own, flow, batch.get("attention_mask"))).mean()

    def errors(self, own: Flow, flow: Flow, mask: Tensor | None) -> list[Tensor]:
        """The match error of every changed part, in the order of the layers."""
        losses = []
        for i, (mixer, layout) in enumerate(self.changed):
            if mixer:
                losses.append(_relative(own.branches[i], flow.branches[i], flow.branches[i], mask))
            if layout:
                losses.append(_relative(own.outputs[i], flow.outputs[i], flow.outputs[i] - flow.inputs[i], mask))
        return losses

    @property
    def parts(self) -> list[str]:
        """What `errors` are of."""
        found = []
        for i, (mixer, layout) in enumerate(self.changed):
            found += [f"layer {i}, mixer"] if mixer else []
            found += [f"layer {i}, output"] if layout else []
        return found

    @torch.no_grad()
    def mean_errors(self, model: Any, batches: Iterable[Batch]) -> list[float]:
        """The match errors over batches, in evaluation mode."""
        model.eval()
        sums, number = [0.0] * len(self.parts), 0
        for batch in (moved(batch, model) for batch in batches):
            flow, _ = self._taught(batch)
            with tapped(self.layers, forced=flow.inputs) as own:
                answer(model, batch)
            errors = self.errors(own, flow, batch.get("attention_mask"))
            sums, number = [a + float(b) for a, b in zip(sums, errors, strict=True)], number + 1
        return [total / max(number, 1) for total in sums]

    def align(self, model: Any, batch: Batch) -> Tensor:
        flow, taught = self._taught(batch)
        model.eval()
        with tapped(self.layers) as own:
            given = answer(model, batch)
        mask = batch.get("attention_mask")
        hidden = [_centred(s, t, mask) for s, t in zip(own.outputs, flow.outputs, strict=True)]
        return torch.stack([*hidden, _centred(given.tokens, taught.tokens, mask)]).mean() + _features(given, taught)

    def task(self, model: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            taught = answer(self.teacher, batch)
        model.eval()
        given = answer(model, batch)
        loss = _features(given, taught)
        if given.logits is not None and taught.logits is not None:
            loss = loss + _answers(model, given.logits, taught.logits, batch.get("attention_mask"))
            if self.labelled and self.data is not None:
                loss = loss + loss_of(given.logits, batch["labels"], self.data)
        return loss

    @torch.no_grad()
    def _taught(self, batch: Batch) -> tuple[Flow, Answer]:
        with tapped(self.teacher_layers) as flow:
            taught = answer(self.teacher, batch)
        return flow, taught


def _changes(teacher: Layer, student: Layer) -> tuple[bool, bool]:
    """Whether the mixer (or its keys) and the layout are others; cross-covariance attention (XCiT) is no design."""
    old, new = teacher.design, student.design
    assert new is not None, "a student is formix's"
    if old is None:
        return True, False
    return old.mixer != new.mixer or old.source != new.source, old.layout != new.layout


def _relative(given: Tensor, taught: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
    difference, size = (given - taught).float().square().sum(-1), scale.float().square().sum(-1)  # [B, N]
    if mask is not None:
        difference, size = difference * mask, size * mask
    return difference.sum() / size.sum().clamp(min=1e-12)


def _centred(given: Tensor, taught: Tensor, mask: Tensor | None) -> Tensor:
    """The squared difference over the variance of the teacher's tokens."""
    rows = taught.float().flatten(0, 1)
    weights = torch.ones_like(rows[:, :1]) if mask is None else mask.flatten()[:, None].float()
    mean = (rows * weights).sum(0) / weights.sum().clamp(min=1)
    return _relative(given, taught, taught.float() - mean, mask)


def _features(given: Answer, taught: Answer) -> Tensor:
    if given.pooled is None or taught.pooled is None:
        return given.tokens.new_zeros((), dtype=torch.float32)
    own, theirs = (F.normalize(a.pooled.float(), dim=-1) for a in (given, taught))  # type: ignore[union-attr] # [B, P, C]
    alike = 1 - (own * theirs).sum(-1).mean()
    near, nearby = (torch.einsum("bpc,dpc->pbd", p, p) for p in (own, theirs))  # [P, B, B]
    return alike + RELATIONS * F.mse_loss(near, nearby)


def _answers(model: Any, given: Tensor, taught: Tensor, mask: Tensor | None) -> Tensor:
    """How far logits, [B, classes] or [B, N, classes] of tokens, are from the teacher's; padding counts nowhere."""
    if mask is not None and given.dim() == 3:
        given, taught = given[mask.bool()], taught[mask.bool()]
    given, taught = given.float().flatten(0, -2), taught.float().flatten(0, -2)
    if given.shape[-1] == 1:
        return F.mse_loss(given, taught)
    if independent_classes(model):  # each is a distribution over yes and no
        given, taught = (torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (given, taught))
    divergence = F.kl_div(F.log_softmax(given, -1), F.log_softmax(taught, -1), log_target=True, reduction="sum")
    return divergence / len(given)
