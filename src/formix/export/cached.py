"""A decoder that continues texts: keys and values of earlier tokens come in, and go out with those of the new ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from formix.export.program import PLUS, TextProgram
from formix.export.sheet import Axis, Port
from formix.models.cache import CACHE
from formix.models.hf import DesignedAttention


class Past:
    """What formix's layers ask of a cache; transformers' own joins its first keys to an empty tensor of one dimension,
    which OpenVINO does not convert."""

    def __init__(self, keys_and_values: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        self.kept = dict(keys_and_values)

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, past + N, D] of a layer, out of those of new tokens [B, H, N, D]."""
        if layer in self.kept:
            before = self.kept[layer]
            self.kept[layer] = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
            return self.kept[layer]
        return key, value


class CachedProgram(TextProgram):
    """input_ids [batch, tokens] of the new tokens, attention_mask [batch, past + tokens] of all, and of each layer with
    keys `past_key_values.LAYER.key` and `.value` [batch, heads, past, head size] -> logits of the new tokens, and
    `present.LAYER.key` and `.value` [batch, heads, past + tokens, head size], the next call's past.

    The names are those of transformers' models that Optimum exports. A text's first call has a past of 0 tokens.

    Raises:
        ValueError: as many tokens in each call as the model has positions.
    """

    judged = 1

    def __init__(self, model: Any, task: str, *, batch: int | None = None, tokens: int | None = None) -> None:
        from formix.models.text import positions

        super().__init__(model, task, batch=batch, tokens=tokens)
        ids, mask = self.inputs
        of_all = f"past{PLUS}{ids.shape[1]}"
        self.room = positions(model.config)
        if self.room is not None and (tokens or 1) >= self.room:
            raise ValueError(
                f"tokens is {tokens or 1}, and this model has {self.room} positions, which leaves none for a past; "
                "give fewer tokens, or leave out cache."
            )
        self.axes["past"] = Axis(least=0, most=None if self.room is None else self.room - (tokens or 1))
        self.layers = {m.layer_idx: m for m in model.modules() if isinstance(m, DesignedAttention) and m.kv_heads.own}
        dtype = next(model.parameters()).dtype
        self.dtype = dtype if dtype == torch.float16 else torch.float32  # NumPy, and so the runtimes, have no bfloat16
        name = str(self.dtype).removeprefix("torch.")
        self.inputs = (ids, Port(name=mask.name, dtype=mask.dtype, shape=(mask.shape[0], of_all), about=mask.about))
        for layer, attention in self.layers.items():
            shape = (mask.shape[0], len(attention.kv_heads.own), "past", attention.head_dim)
            for kind in ("key", "value"):
                about = f"`present.{layer}.{kind}` of the call before; none of the first, whose past is 0 tokens long"
                self.inputs += (Port(name=f"past_key_values.{layer}.{kind}", dtype=name, shape=shape, about=about),)

    def sizes(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """Past and tokens together are within the positions that the model has."""
        sizes = super().sizes(wanted)
        if self.room is not None:
            (tokens,) = self.shape(self.inputs[0], sizes)[1:]
            sizes["past"] = min(sizes["past"], self.room - tokens)
        return sizes

    def example(self, sizes: Mapping[str, int], *, padding: str = "none", seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        ids, mask = self.texts(self.shape(self.inputs[1], sizes), padding, generator)
        past = [torch.randn(self.shape(port, sizes), generator=generator).to(self.dtype) for port in self.inputs[2:]]
        return ids[:, sizes["past"] :].contiguous(), mask, *past

    def named_outputs(self, *inputs: Tensor) -> dict[str, Tensor]:
        ids, mask, *past = inputs
        dtype = next(self.model.parameters()).dtype
        pairs = zip(self.layers, past[::2], past[1::2], strict=True)
        cache = Past({layer: (key.to(dtype), value.to(dtype)) for layer, key, value in pairs})
        # the mask in full: transformers would ask how long the past is, and a file for past = 0 alone come of it
        columns = torch.arange(mask.shape[1], device=mask.device)
        rows = torch.arange(ids.shape[1], device=mask.device) + (mask.shape[1] - ids.shape[1])
        seen = mask.bool()[:, None, None] & (columns <= rows[:, None])  # [B, 1, N, past + N]
        masks: Any = seen
        if window := getattr(self.model.config, "sliding_window", None):
            near = seen & (columns > rows[:, None] - window)
            masks = {"full_attention": seen, "sliding_attention": near}
        positions = (mask.cumsum(-1) - 1).clamp(min=0).index_select(1, rows)
        out = self.model(input_ids=ids, attention_mask=masks, position_ids=positions, use_cache=True, **{CACHE: cache})
        present = {
            f"present.{layer}.{kind}": x
            for layer in self.layers
            for kind, x in zip(("key", "value"), cache.kept[layer], strict=True)
        }
        return {"logits": out.logits, **present}

    def floats(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The logits in float32, and keys and values in the type that they come in."""
        logits, *present = self.named_outputs(*inputs).values()
        return logits.float(), *(x.to(self.dtype) for x in present)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past_key_values: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.floats(input_ids, attention_mask, *past_key_values)
