"""`formix analyze`: what the layers of a model do to its tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from formix.commands.arguments import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """Spread of token embeddings and share of attention, layer by layer."""

    model: str  # a directory of formix's or of transformers (BERT, RoBERTa, GPT-2, Llama)
    data: str  # a name of `formix data`; its test split is read
    batches: int = 4  # how many batches
    batch_size: int = 32  # samples in each
    sequence_length: int = 128  # tokens of a window or sentence
    tokenizer: str | None = None  # a transformers tokenizer directory
    json: bool = False  # print JSON instead of a table


def analyze(arguments: list[str]) -> int:
    """Print the spread of token embeddings and the share of attention, layer by layer."""
    from torch.utils.data import DataLoader
    from transformers import AutoModel

    from formix import load
    from formix.analysis import analyze as run
    from formix.data import collate, load_data
    from formix.models.directory import read_config

    config = parse(AnalyzeConfig, "analyze", arguments)
    if config.batches < 1 or config.batch_size < 1:
        raise ValueError(f"batches is {config.batches} and batch_size {config.batch_size}; both must be 1 or more.")
    stored = read_config(Path(config.model))
    plain = "model_type" in stored and not str(stored["model_type"]).startswith("formix_")
    model = AutoModel.from_pretrained(config.model, local_files_only=True).eval() if plain else load(config.model)
    data = load_data(config.data, sequence_length=config.sequence_length, tokenizer=config.tokenizer)
    loader = DataLoader(data.test, batch_size=config.batch_size, collate_fn=collate)
    result = run(model, loader, max_batches=config.batches)
    print(result.to_json() if config.json else result)
    return 0
