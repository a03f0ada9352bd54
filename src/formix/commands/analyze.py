"""`formix analyze`: what the layers of a model do to its tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formix.commands.arguments import parse_model

if TYPE_CHECKING:
    from formix.data import Data


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """Spread of token embeddings and share of attention, layer by layer."""

    # a directory of formix's, a training run's too, or of transformers (BERT, RoBERTa, DistilBERT, GPT-2, Llama, Qwen,
    # Mistral, CvT and their relatives)
    model: str
    data: str  # a name of `formix data`; its test split is read
    batches: int = 4  # how many batches
    batch_size: int = 32  # samples in each
    sequence_length: int = 128  # tokens of a window or sentence
    tokenizer: str | None = None  # a transformers tokenizer directory; None: the model's own
    img_size: int | None = None  # side that images of folders are scaled to; None: the model's
    json: bool = False  # print JSON instead of a table


def analyze(arguments: list[str]) -> int:
    """Print the spread of token embeddings and the share of attention by layer: formix analyze DIR --data=NAME."""
    from torch.utils.data import DataLoader
    from transformers import AutoModel

    from formix import load
    from formix.analysis import analyze as run
    from formix.data import collate
    from formix.models.directory import read_config
    from formix.models.text import as_choices
    from formix.training.job import trained_model

    config = parse_model(AnalyzeConfig, "analyze", arguments)
    config = dataclasses.replace(config, model=str(trained_model(Path(config.model))[0]))
    if config.batches < 1 or config.batch_size < 1:
        raise ValueError(f"batches is {config.batches} and batch_size {config.batch_size}; both must be 1 or more.")
    stored = read_config(Path(config.model))
    plain = "model_type" in stored and not str(stored["model_type"]).startswith("formix_")
    model = AutoModel.from_pretrained(config.model, local_files_only=True).eval() if plain else load(config.model)
    loader = DataLoader(_data(config, model).test, batch_size=config.batch_size, collate_fn=collate)
    batches = (as_choices(model, batch) if isinstance(batch, dict) else batch for batch in loader)
    result = run(model, batches, max_batches=config.batches)
    print(result.to_json() if config.json else result)
    return 0


def _data(config: AnalyzeConfig, model: Any) -> Data:
    """The data as the model reads them.

    Raises:
        ValueError: data that the model cannot read.
    """
    from formix.data import load_data
    from formix.evaluation.suitable import as_trained, check_data, check_source, image_side, reads_text, tokenizer_for

    name, tokenizer = f"The model in {config.model}", None
    check_source(model, config.data, name, sequence_length=config.sequence_length)
    if reads_text(model):
        tokenizer = tokenizer_for(config.model, config.tokenizer)
        data = load_data(config.data, sequence_length=config.sequence_length, tokenizer=tokenizer)
    else:
        data = as_trained(model, load_data(config.data, img_size=config.img_size or image_side(model)))
    check_data(model, data, name, own=tokenizer is not None)
    return data
