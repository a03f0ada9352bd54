"""Small text models of every family, for the tests of what all families must do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import formix
from formix.models.text import FAMILIES

VOCABULARY = 60
_ENCODER = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
}
# family -> (name to create, fields that make it small)
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2-nano", {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}),
    "bert": ("bert-tiny", _ENCODER),
    "roberta": ("roberta-tiny", _ENCODER),
    "distilbert": ("distilbert-base", _ENCODER),
    "llama": ("llama-nano", {**_ENCODER, "num_key_value_heads": 2}),
}
DECODERS = ("gpt2", "llama")
assert set(SMALL) == set(FAMILIES), "a new family needs a small model here, and is then tested by being registered"


def small(family: str, design: str | formix.Design = "softmax", task: str | None = None, **config: Any) -> Any:
    """A small model in evaluation mode, with weights large enough that blocks change the logits."""
    name, fields = SMALL[family]
    torch.manual_seed(0)
    fields = {"pad_token_id": 1, "initializer_range": 0.2, **fields, **config}
    return formix.create_model(name, design=design, task=task, **fields).eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Token ids none of which is padding or special."""
    return torch.randint(5, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
