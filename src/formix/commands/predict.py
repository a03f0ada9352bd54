"""`formix predict`: what a saved model says of new pictures and texts."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from formix.commands.arguments import parse, split_named
from formix.records import plain

if TYPE_CHECKING:
    from formix.data.encoded import EncodedImage
    from formix.evaluation.prediction import Prediction


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What a model says of pictures (files, folders, .tar) or of texts (a line of a file each; a tab between pairs)."""

    model: str  # a training run's directory, or one that formix saved a model in
    inputs: list[str] = field(default_factory=list)  # files or folders; - is standard input
    text: str | None = None  # a text itself, in place of files
    top: int = 5  # classes or tokens, best first
    batch_size: int = 32  # inputs at a time
    new_tokens: int = 64  # that a language model adds
    temperature: float = 0.0  # of its draws; 0: always the most probable token
    seed: int = 0  # of its draws
    on_bad_sample: Literal["refuse", "skip"] = "refuse"  # a picture that cannot be read is an error, or is left out
    tokenizer: str | None = None  # a transformers tokenizer directory; None: the model's own
    out: str | None = None  # a .csv or .jsonl file
    json: bool = False  # print JSON, a line for each input

    def __post_init__(self) -> None:
        for name in ("top", "batch_size", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more.")
        if self.out is not None and Path(self.out).suffix not in (".csv", ".jsonl"):
            raise ValueError(f"out is {self.out!r}; it must end in .csv or .jsonl.")
        if self.out is not None and Path(self.out).resolve() in [Path(path).resolve() for path in self.inputs]:
            raise ValueError(f"out is {self.out!r}, which is one of the inputs; give another file.")


def predict(arguments: list[str]) -> int:
    """Print what a model says of pictures or texts: formix predict DIR FILE ..."""
    import torch
    from transformers.utils import logging

    from formix import load
    from formix.models.text import task_of
    from formix.training.job import trained_model

    named, flags = split_named(arguments, PredictConfig)
    if named and not any(flag.split("=")[0] == "--model" for flag in flags):
        flags.append(f"--model={named.pop(0)}")
    if named:
        flags.append(f"--inputs={json.dumps(named)}")
    config = parse(PredictConfig, "predict", flags)
    if not config.inputs and config.text is None:
        raise ValueError("inputs are missing; give files or folders behind the model, or --text.")
    directory, _ = trained_model(Path(config.model))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load(directory)
    torch.manual_seed(config.seed)
    found = (_of_images if task_of(model) == "image-classification" else _of_texts)(model, config, directory)
    if config.out is not None:
        found = _kept(found, Path(config.out))
    if config.json:
        for prediction in found:
            print(json.dumps(_plain(prediction), ensure_ascii=False))
    elif config.out is not None:
        print(f"{sum(1 for _ in found)} predictions: {config.out}")
    else:
        for prediction in found:
            print(_line(prediction))
    return 0


def _of_images(model: Any, config: PredictConfig, directory: Path) -> Iterator[Prediction]:
    from formix.data.unreadable import count_skipped, readable
    from formix.evaluation.prediction import predict_images

    if config.text is not None or config.tokenizer is not None:
        raise ValueError(f"The model in {directory} is for images; give files of pictures, no text and no tokenizer.")
    images = [image for path in config.inputs for image in _pictures(Path(path))]
    if config.on_bad_sample == "skip":
        fine = dict(zip(images, readable(images), strict=True))
        count_skipped(str(directory), {"prediction": [image.name for image in images if not fine[image]]})
        images = [image for image in images if fine[image]]
        if not images:
            raise ValueError(f"None of the {len(fine)} pictures can be read; give others.")
    return predict_images(model, images, top=config.top, batch_size=config.batch_size)


def _pictures(path: Path) -> list[EncodedImage]:
    from formix.data.encoded import EncodedImage
    from formix.data.folder import picture_tree

    if not path.exists():
        raise ValueError(f"{str(path)!r} does not exist; give pictures, folders of them, or a .tar.")
    if path.is_file() and path.suffix.lower() != ".tar":
        return [EncodedImage(str(path), path.read_bytes)]
    return list(picture_tree(path)[0].values())


def _of_texts(model: Any, config: PredictConfig, directory: Path) -> Iterator[Prediction]:
    from formix.data.text import load_tokenizer
    from formix.evaluation.prediction import predict_texts
    from formix.evaluation.suitable import tokenizer_for

    place = tokenizer_for(directory, config.tokenizer)
    if place is None:
        raise ValueError(f"{directory} has no tokenizer; give the one that the model was trained with as --tokenizer.")
    tokenizer = load_tokenizer(place)
    texts = [*([] if config.text is None else [config.text]), *(line for p in config.inputs for line in _lines(p))]
    return predict_texts(
        model,
        tokenizer,
        texts,
        top=config.top,
        batch_size=config.batch_size,
        new_tokens=config.new_tokens,
        temperature=config.temperature,
    )


def _lines(path: str) -> list[str]:
    """The texts of a file, a line each, ended by \\n, \\r\\n or \\r and by no other character.

    ValueError for an empty line, for which there is nothing to say.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; give files with a text in each line.")
    encoded = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        lines = [line.decode() for line in encoded.removeprefix(codecs.BOM_UTF8).splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}).") from None
    if not lines:
        raise ValueError(f"{path} has no text; give a line for each.")
    if empty := [number for number, line in enumerate(lines, start=1) if not line.strip()]:
        raise ValueError(f"Line {empty[0]} of {path} is empty; each line is a text.")
    return lines


def _kept(predictions: Iterable[Prediction], path: Path) -> Iterator[Prediction]:
    """The predictions, each written down as it comes; the file has its name when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        for number, prediction in enumerate(predictions):
            if path.suffix == ".jsonl":
                file.write(json.dumps(_plain(prediction), ensure_ascii=False) + "\n")
            else:
                header, *values = _rows(prediction)
                rows.writerows(values if number else [header, *values])
            yield prediction
    partial.replace(path)


def _rows(prediction: Prediction) -> list[list[Any]]:
    """Header and row of a CSV file; a row for each run of tokens."""
    if prediction.text is not None:
        return [["input", "text"], [prediction.input, prediction.text]]
    if prediction.features is not None:
        names = [f"feature_{i}" for i in range(len(prediction.features))]
        return [["input", *names], [prediction.input, *prediction.features]]
    best = list(zip(prediction.labels, prediction.scores, strict=False))
    if prediction.runs is not None:
        found = zip(prediction.runs, best, strict=True)
        return [["input", "run", "label", "score"], *([prediction.input, run, *one] for run, one in found)]
    if not best:
        return [["input", "value"], [prediction.input, *prediction.scores]]
    header, row = ["input"], [prediction.input, *(value for one in best for value in one)]
    for rank in range(1, len(best) + 1):
        header += [f"label_{rank}", f"score_{rank}"]
    return [header, row]


def _plain(prediction: Prediction) -> dict[str, Any]:
    """As JSON, without what it has not."""
    everything = plain(prediction)
    if prediction.runs is not None:  # there may be none
        return {k: v for k, v in everything.items() if v is not None}
    return {k: v for k, v in everything.items() if v is not None and v != []}


def _line(prediction: Prediction) -> str:
    """For people."""
    if prediction.text is not None:
        return prediction.input + prediction.text
    if prediction.features is not None:
        first = ", ".join(f"{x:.4f}" for x in prediction.features[:4])
        return f"{prediction.input}: {len(prediction.features)} features, {first}, ... (--out or --json gives all)"
    best = [f"{label} {score:.4f}" for label, score in zip(prediction.labels, prediction.scores, strict=False)]
    if prediction.runs is not None:
        found = [f"{run}: {one}" for run, one in zip(prediction.runs, best, strict=True)]
        return f"{prediction.input}: {', '.join(found) or 'no runs'}"
    return f"{prediction.input}: {', '.join(best) or f'{prediction.scores[0]:.4f}'}"
