"""Calibration without training: one gain per head, in closed form, folded into the output projection.

A layer's branch is the sum of its heads' contributions, A_s = sum_h g_h Z_h W_h + b, with g = 1 as converted. On the
teacher's own inputs the gains that bring it nearest to the teacher's branch A_t solve H equations in H unknowns,

    M g = r,   M_hk = <Z_h W_h, Z_k W_k>,   r_h = <Z_h W_h, A_t - b>

and W_h <- g_h W_h leaves the model's design and size as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from formix.conversion.record import Conversion
from formix.conversion.taps import answer, moved, tapped
from formix.data import Batch
from formix.models.parts import Layer, layers, weight_in_out

RIDGE = 1e-6  # of the mean diagonal, so that a head that is nothing does not end the solution


@torch.no_grad()
def calibrate(model: nn.Module, teacher: nn.Module, batches: Iterable[Batch], *, fold: bool = True) -> dict[str, Any]:
    """Fit the gains of all layers at once on a few batches and fold them in; with `fold` False only measure.

    Returns:
        The record of the stage: by layer, the gains and the match error |A_s - A_t|^2 / |A_t|^2 before and after.
    """
    own, theirs = layers(model.eval()), layers(teacher.eval())
    fits = [
        _Fit(i, mine)
        for i, (mine, other) in enumerate(zip(own, theirs, strict=True))
        if mine.out is not None and _mixer(mine) != _mixer(other)
    ]
    teacher.to(next(model.parameters()).device)
    for batch in (moved(batch, model) for batch in batches):
        with tapped(theirs) as taught:
            answer(teacher, batch)
        with tapped(own, forced=taught.inputs) as flow:
            answer(model, batch)
        for fit in fits:
            fit.add(flow.mixed[fit.index], taught.branches[fit.index], batch.get("attention_mask"))
    rows = [fit.solve() for fit in fits]
    if fold:
        conversion = Conversion.of(model)
        names = {id(p): n for n, p in model.named_parameters()}
        for fit, row in zip(fits, rows, strict=True):
            weight = fit.layer.out.weight
            if conversion is not None:
                name, plan = names[id(weight)], conversion.plan
                conversion.aside.setdefault(name, weight.detach().clone())
                plan["kept"] = [kept for kept in plan["kept"] if kept != name]
                plan["folded"][name] = "a gain per head"
            gains = torch.tensor(row["gains"]).repeat_interleave(fit.width)
            weight_in_out(fit.layer.out).mul_(gains.to(weight)[:, None])
        if conversion is not None:
            conversion.note_folded(model)
            model.conversion = conversion  # type: ignore[assignment]
            conversion.stages.append({"stage": "calibrate", "trained": False, "layers": rows})
    return {"stage": "calibrate", "trained": False, "layers": rows}


def _mixer(layer: Layer) -> Any:
    return None if layer.design is None else layer.design.mixer  # None: none of formix's


class _Fit:
    """The normal equations of one layer."""

    def __init__(self, index: int, layer: Layer) -> None:
        self.index, self.layer = index, layer
        heads = layer.heads
        self.width = weight_in_out(layer.out).shape[0] // heads
        self.products, self.right = torch.zeros(heads, heads).double(), torch.zeros(heads).double()
        self.total = 0.0

    def add(self, mixed: Tensor, taught: Tensor, mask: Tensor | None) -> None:
        bias = 0 if self.layer.out.bias is None else self.layer.out.bias
        target, z = (taught - bias).flatten(0, 1), mixed.flatten(0, 1)  # [T, C], [T, H D]
        if mask is not None:
            target, z = target[mask.flatten() > 0], z[mask.flatten() > 0]
        weight = weight_in_out(self.layer.out).unflatten(0, (-1, self.width))  # [H, D, C]
        parts = torch.einsum("thd,hdc->htc", z.unflatten(1, (-1, self.width)), weight).flatten(1).double()
        self.products += (parts @ parts.T).cpu()
        self.right += (parts @ target.flatten().double()).cpu()
        self.total += float(target.double().square().sum())

    def solve(self) -> dict[str, Any]:
        scale = self.products.diagonal().mean().clamp(min=1e-30)
        eye = torch.eye(len(self.right), dtype=torch.float64)
        gains = torch.linalg.solve(self.products + RIDGE * scale * eye, self.right + RIDGE * scale)  # towards 1
        return {
            "layer": self.index,
            "gains": gains.tolist(),
            "error_before": self._error(torch.ones_like(gains)),
            "error_after": self._error(gains),
        }

    def _error(self, gains: Tensor) -> float:
        left = float(gains @ self.products @ gains - 2 * gains @ self.right)
        return (left + self.total) / max(self.total, 1e-30)
