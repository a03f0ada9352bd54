"""The model that a comparison trains when the study names none: small, and the same trunk for every design."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formix import create_model
from formix.data import Data
from formix.data.byte_tokenizer import byte_tokenizer
from formix.data.masking import BYTE_PAD
from formix.data.text import own_tokenizer
from formix.evaluation.suitable import check_data, check_numbers, wrong_kind
from formix.models.directory import read_config
from formix.models.text import SIZES

IMAGE_MODEL = "vit_tiny_patch16_224"


def default_model(data: Data) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a small model for the data.

    Images: 4 layers, width 64, at most 8 x 8 patches, no class token and mean pooling, so that designs that mix no
    tokens read out as the others do. Language modelling: GPT-2 of 4 layers, width 128. Masked language modelling and
    sentences: BERT of 2 layers, width 128.
    """
    if data.task == "image-classification":
        assert data.img_size is not None
        small = {"embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
        return IMAGE_MODEL, {
            **small,
            "patch_size": patch_size(data.img_size),
            "class_token": False,
            "global_pool": "avg",
        }
    if data.task == "causal-lm":
        return "gpt2-nano", {}
    return "bert-tiny", {}


def patch_size(img_size: tuple[int, int]) -> int:
    """The smallest patch that divides the image and leaves at most 8 patches a side; at least 2."""
    height, width = img_size
    fitting = [p for p in range(2, min(height, width) + 1) if height % p == 0 and width % p == 0]
    return next((p for p in fitting if max(height, width) // p <= 8), fitting[-1] if fitting else 1)


def build_model(data: Data, name: str | None, arguments: dict[str, Any], design: Any) -> Any:
    """A model for the data with the design's blocks and fresh weights; arguments override the default model's."""
    check_arguments(data, arguments)
    base, defaults = default_model(data)
    if name is not None and name != base:
        base, defaults = name, {}
    images, directory = data.task == "image-classification", "/" in base or Path(base).is_dir()
    if images and base in SIZES:
        raise ValueError(f"{base} is a model of text, and {data.name!r} is {data.task}; name one of images.")
    if not images and base not in SIZES and not directory:
        raise ValueError(f"{base} is no model of text, and {data.name!r} is {data.task}; there are {', '.join(SIZES)}.")
    decided = data_arguments(data, SIZES[base][0] if base in SIZES else None)
    if Path(base, "config.json").is_file():  # a directory brings its own sizes, and only the output is the task's
        if images == ("vocab_size" in read_config(Path(base))):
            raise wrong_kind(base, data.name, text=images)
        decided = {key: decided[key] for key in ("num_classes", "num_labels") if key in decided}
        if data.task != "image-classification":
            decided["task"] = data.task.replace("regression", "classification")
    model = create_model(base, design=design, **{**defaults, **decided, **arguments})
    check_data(model, data, base)
    if not images and (beside := own_tokenizer(Path(base))) is not None:
        check_numbers(data.tokenizer or byte_tokenizer(masked=data.task == "masked-lm"), beside)
    return model.float()  # what a directory has in half precision, too: there the optimiser's small steps are lost


def check_arguments(data: Data, arguments: dict[str, Any]) -> None:
    """Raise `ValueError` for model arguments that the data or other settings decide."""
    decided = {"name": "model", "design": "designs", "img_size": "img_size", "task": "data"}
    decided |= dict.fromkeys(("in_chans", "num_classes", "num_labels"), "data")
    for name in decided.keys() & arguments.keys():
        raise ValueError(f"model_args has {name!r}, which the setting {decided[name]!r} decides; leave it out.")
    for name, least in data_arguments(data).items():
        if name in ("vocab_size", "n_positions", "max_position_embeddings") and name in arguments:
            least = min(least, data.sequence_length or 0) if name == "max_position_embeddings" else least
            if not isinstance(arguments[name], int) or arguments[name] < least:
                raise ValueError(f"model_args has {name}={arguments[name]!r}, and {data.name} needs {least} or more.")


def data_arguments(data: Data, family: str | None = None) -> dict[str, Any]:
    """What the data decide: sizes of input and output, in the words of a text model's family."""
    if data.task == "image-classification":
        return {"img_size": data.img_size, "in_chans": data.in_chans, "num_classes": data.num_classes}
    if data.task == "causal-lm":
        ends = {name: getattr(data.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
        decided = {"vocab_size": data.vocab_size, **ends}
        if family == "llama":
            return {**decided, "max_position_embeddings": data.sequence_length}
        if family not in (None, "gpt2"):
            raise ValueError(
                f"{data.name!r} is read to predict the next token, and {family} models do not: give task='masked-lm', "
                "or name a decoder, such as 'gpt2-nano'."
            )
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return {**decided, "n_positions": data.sequence_length, **dropout}
    if data.task == "masked-lm":
        pad = BYTE_PAD if data.tokenizer is None else data.tokenizer.pad_token_id or 0
        output: dict[str, Any] = {"task": "masked-lm"}
        positions = pad + 1  # RoBERTa's begin there
    else:
        pad = getattr(data.tokenizer, "pad_token_id", 0) or 0
        output, positions = {"num_labels": data.num_classes}, 0
    return {
        "vocab_size": data.vocab_size,
        "max_position_embeddings": max(512, (data.sequence_length or 0) + positions),
        "pad_token_id": pad,
        **output,
    }
