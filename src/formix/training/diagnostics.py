"""What goes on inside a model, layer by layer: three figures that show early what goes wrong later."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from formix.analysis import analyze
from formix.data import Batch
from formix.design import Mixer, Pointwise
from formix.layers import GatedUnit
from formix.layers.attend import watching
from formix.models.modes import evaluating
from formix.ops.masks import repeat_heads
from formix.training.tasks import MODEL_INPUTS, forward

ZERO_BELOW = ("relu", "relu2", "relu6")  # functions of the score that are 0 for all negative ones


@torch.no_grad()
def diagnose(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Figures of every layer on a batch, by "name/layer"; the model runs in evaluation mode and is left as it was.

    rms     root mean square of the mixer's output: shrinks with 1/N in SimA, explodes before a run does
    spread  of the token embeddings that a block gives (`formix.analysis`): 0 where all tokens have become the same
    active  share of the visible scores above 0, where h is relu, relu2 or relu6; a head at 0 learns nothing any more

    `spread` is of the layers that `formix.models.parts` knows and is left out of others.
    """
    layer = ""
    rms: dict[str, float] = {}
    active: dict[str, list[float]] = {}

    def enter(name: str) -> Any:
        def hook(module: nn.Module, *inputs: Any) -> None:
            nonlocal layer
            layer = name

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            rms[f"rms/{name}"] = out.float().square().mean().sqrt().item()

        return hook

    def see(mixer: Mixer, query: Tensor, key: Tensor, visible: Tensor | None, bias: Tensor | None) -> None:
        if isinstance(mixer, Pointwise) and mixer.activation in ZERO_BELOW:  # twice in differential attention
            active.setdefault(f"active/{layer}", []).append(_active_share(query, key, visible, bias))

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, GatedUnit) or (hasattr(module, "mixer") and hasattr(module, "num_heads")):
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in batch.items() if k in ("pixel_values", *MODEL_INPUTS)}
    try:
        with _uncompiled(model), watching(see):
            try:
                layers = analyze(model, [inputs]).layers
            except ValueError:  # a family whose blocks it does not know
                layers = []
                with evaluating(model):
                    forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    shares = {name: statistics.fmean(values) for name, values in active.items()}
    return {**rms, **{f"spread/{row.name}": row.spread_after_ffn for row in layers}, **shares}


def _active_share(query: Tensor, key: Tensor, visible: Tensor | None, bias: Tensor | None) -> float:
    """Share of the visible pairs [B, H, Nq, Nk] with a score above 0; the scale of the scores is positive."""
    scores = query.float() @ repeat_heads(key, query.shape[1]).float().transpose(-2, -1)
    positive = (scores if bias is None else scores * query.shape[-1] ** -0.5 + bias) > 0
    if visible is None:
        return positive.float().mean().item()
    visible = visible.expand_as(positive)
    return ((positive & visible).sum() / visible.sum().clamp(min=1)).item()


@contextlib.contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Hooks do not fire inside a compiled model, so a model that `model.compile()` compiled runs as it was written."""
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled
