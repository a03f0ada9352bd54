"""The keys and values of earlier tokens that a decoder keeps between calls, in transformers' `Cache`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

# what masks and outputs of transformers call the keys and values of earlier tokens: "cache" since 5.24
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def cache_of(model: Any, past_key_values: Any, cache: Any, use_cache: bool | None) -> tuple[Any, bool | None]:
    """The cache that a decoder's forward pass reads and fills, under either name, and whether it is given back."""
    if past_key_values is not None and cache is not None:
        raise ValueError("Give the keys and values of earlier tokens as past_key_values or as cache, not as both.")
    past_key_values = cache if past_key_values is None else past_key_values
    if model.gradient_checkpointing and model.training:
        return None, False  # recomputing a layer would add to the cache again
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=model.config)
    return past_key_values, use_cache


def next_positions(x: Tensor, past_key_values: Any) -> Tensor:
    """[1, N], counted on from the tokens in the cache."""
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    return torch.arange(x.shape[1], device=x.device)[None] + past


def count_tokens(x: Tensor, past_key_values: Any, layer_idx: int) -> None:
    """Lets the cache know the tokens that a layer without keys has seen, if that is the layer by which it counts."""
    if past_key_values is not None and layer_idx == 0:
        empty = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
        past_key_values.update(empty, empty, layer_idx)
