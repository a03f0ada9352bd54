"""What a transformers directory keeps beside the weights: how its inputs are made, and what its outputs are for."""

from __future__ import annotations

import json
from pathlib import Path

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
_SENTENCES = ("config_sentence_transformers.json", "sentence_bert_config.json")
SENTENCE_FILES = ("modules.json", *_SENTENCES, "[0-9]*_*/*")  # as patterns of a whole repository's files


def companions(directory: Path) -> list[Path]:
    """Those of a directory, as paths in it."""
    return [Path(name) for name in COMPANIONS if (directory / name).is_file()]


def sentence_modules(directory: Path) -> list[Path]:
    """What sentence-transformers keeps there, as paths in it: the list of modules (pooling, dense layers) that make an
    embedding of the last hidden states, their files, and the length of a text. Nothing where the list is missing or
    puts the transformer itself elsewhere."""
    listed = directory / "modules.json"
    if not listed.is_file():
        return []
    places = [Path(module["path"]) for module in json.loads(listed.read_text())]
    if Path() not in places:
        return []
    found = [Path(listed.name), *(Path(name) for name in _SENTENCES if (directory / name).is_file())]
    for place in places:
        if place != Path() and not place.is_absolute() and ".." not in place.parts:
            found += [p.relative_to(directory) for p in sorted((directory / place).rglob("*")) if p.is_file()]
    return found
