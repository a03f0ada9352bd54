"""What flows through the layers of a model in one forward pass, and layers fed with another model's inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from formix.data import Batch
from formix.evaluation.sentences import mean_pooled
from formix.models.parts import Layer

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass
class Flow:
    """Tensors [B, N, C] of every layer, in order."""

    inputs: list[Tensor] = field(default_factory=list)  # of the layers
    mixed: list[Tensor] = field(default_factory=list)  # what goes into the output projections, [B, N, H D]
    branches: list[Tensor] = field(default_factory=list)  # of the mixers, before layer scale and residual
    outputs: list[Tensor] = field(default_factory=list)  # of the layers


@contextlib.contextmanager
def tapped(layers: Sequence[Layer], forced: Sequence[Tensor] | None = None) -> Iterator[Flow]:
    """Record the flow of the forward pass inside; with `forced`, every layer reads these inputs and not its own.

    Nothing outlives the pass but what the caller keeps: activations are streamed, never stored.
    """
    flow, handles = Flow(), []
    for i, layer in enumerate(layers):

        def enter(_: Any, args: tuple, i: int = i) -> tuple | None:
            x = args[0] if forced is None else forced[i].to(args[0].dtype)
            flow.inputs.append(x)
            return None if forced is None else (x, *args[1:])

        def leave(_: Any, args: tuple, out: Any) -> None:
            flow.outputs.append(out[0] if isinstance(out, tuple) else out)

        def branch(_: Any, args: tuple, out: Any) -> None:
            flow.mixed.append(args[0])
            flow.branches.append(out[0] if isinstance(out, tuple) else out)

        handles += [
            layer.block.register_forward_pre_hook(enter),
            layer.block.register_forward_hook(leave),
            layer.branch.register_forward_hook(branch),
        ]
    try:
        yield flow
    finally:
        for handle in handles:
            handle.remove()


def moved(batch: Batch, model: nn.Module) -> Batch:
    """The batch on the model's device, and in its floating-point type."""
    like = next(model.parameters())
    return {k: v.to(like) if v.is_floating_point() else v.to(like.device) for k, v in batch.items()}


@dataclass
class Answer:
    """What a model makes of a batch."""

    tokens: Tensor  # [B, N, C], behind the last norm
    pooled: Tensor | None  # [B, P, C]: what stands for a whole sample, P of them; None for decoders
    logits: Tensor | None


def answer(model: Any, batch: Batch) -> Answer:
    """Tokens, pooled features and logits of any of formix's models.

    Pooled are the mean of the tokens for an encoder, the class token and the mean of the patches for an image.
    """
    if "pixel_values" in batch:
        tokens = model.forward_features(batch["pixel_values"])  # [B, N, C]
        prefix = getattr(model, "num_prefix_tokens", 0)
        pooled = [tokens[:, prefix:].mean(1)] + ([tokens[:, 0]] if prefix else [])
        logits = model.forward_head(tokens) if getattr(model, "num_classes", 0) else None
        return Answer(tokens, torch.stack(pooled, 1), logits)
    from formix.models.text import as_choices

    trunk: nn.Module = getattr(model, model.base_model_prefix, model)
    seen: list[Tensor] = []
    handle = trunk.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    try:
        out = model(**as_choices(model, {k: batch[k] for k in INPUTS if k in batch}))
    finally:
        handle.remove()
    causal = hasattr(model, "generation_config") and model.can_generate()
    return Answer(
        seen[0],
        None if causal else mean_pooled(seen[0], batch.get("attention_mask"))[:, None],
        getattr(out, "logits", None),
    )
