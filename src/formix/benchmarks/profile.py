"""Where the time of a call goes, by the parts of a transformer rather than by operators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.pytorch_utils import Conv1D

from formix.models.parts import layers

PARTS = ("qkv projection", "attention", "output projection", "MLP", "norms", "embedding and head", "optimizer", "rest")
_PROJECTIONS = (nn.Linear, nn.Conv2d, Conv1D)
_PREFIX = "formix.part: "
_BACKWARD = "autograd::engine::evaluate_function"


def profile_parts(model: nn.Module, call: Callable[[], object], calls: int = 3) -> dict[str, float]:
    """Seconds of one `call`, which runs `model`, in each of `PARTS`; parts that take no time are left out.

    Operators of the forward pass belong to the innermost part they run in; those of the backward pass to the part of
    the operator whose gradient they compute, by autograd's sequence numbers. "attention" is what an attention layer
    does besides its two projections; "rest" what belongs to no part: residual sums and the gradients' accumulation.

    Raises:
        ValueError: a model whose layers are not known (`formix.models.parts`).
    """
    hooks = [hook for module, part in _parts(model).items() for hook in _mark(module, part)]
    try:
        call()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(calls):
                call()
    finally:
        for hook in hooks:
            hook.remove()
    seconds = _by_part(profiler.events())
    return {part: seconds[part] / calls for part in PARTS if seconds.get(part)}


def _parts(model: nn.Module) -> dict[nn.Module, str]:
    """The modules whose time is told apart. What has weights outside of the layers is embedding or head."""
    found: dict[nn.Module, str] = {}
    known = layers(model)
    for layer in known:
        found |= dict.fromkeys((m for m in layer.mixer.modules() if isinstance(m, _PROJECTIONS)), "qkv projection")
        found |= dict.fromkeys(layer.ffn, "MLP") | {layer.mixer: "attention"}
        if layer.out is not None:
            found[layer.out] = "output projection"
    inside = {module for layer in known for module in layer.block.modules()}
    for module in model.modules():
        if not any(module.children()) and next(module.parameters(), None) is not None:
            if "norm" in type(module).__name__.lower():
                found[module] = "norms"
            elif module not in inside:
                found[module] = "embedding and head"
    return found


def _mark(module: nn.Module, part: str) -> list[Any]:
    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(_PREFIX + part))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _by_part(events: Any) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    of_sequence: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD) and (part := _enclosing(event)):
            of_sequence[event.sequence_nr] = part
    for event in events:
        part = _enclosing(event)
        if part is None:
            node = _ancestor(event, lambda e: e.name.startswith(_BACKWARD))
            part = of_sequence.get(node.sequence_nr, "rest") if node is not None else "rest"
            if _ancestor(event, lambda e: e.name.startswith("Optimizer.")) is not None:
                part = "optimizer"
        seconds[part] += event.self_cpu_time_total / 1e6
    return seconds


def _enclosing(event: Any) -> str | None:
    marked = _ancestor(event, lambda e: e.name.startswith(_PREFIX))
    return marked.name.removeprefix(_PREFIX) if marked is not None else None


def _ancestor(event: Any, wanted: Callable[[Any], bool]) -> Any:
    while event is not None and not wanted(event):
        event = event.cpu_parent
    return event
