"""`formix eval`: the metric of a saved model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from formix.commands.arguments import parse_model
from formix.records import plain

if TYPE_CHECKING:
    from formix.training.job import JobConfig

# how a text model reads: as in its training, whatever the data
READING = ("sequence_length", "tokenizer", "task", "mask_probability")
# what decides the vocabulary that GLUE's sentences give without a tokenizer
WORDS = ("data", "limit", "validation_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The metric of a model on a split; what is left out is taken from the run that the directory is of."""

    model: str  # a training run's directory, or one that formix saved a model in
    data: str | None = None  # a name of `formix data`
    split: Literal["test", "validation", "train"] = "test"  # which part of the data
    batch_size: int = 256  # samples at a time
    task: Literal["masked-lm"] | None = None  # None: what the data are for
    mask_probability: float | None = None  # of masked-lm
    sequence_length: int | None = None  # tokens of a window or sentence
    tokenizer: str | None = None  # a transformers tokenizer directory; None: the one beside the weights, where one is
    img_size: int | None = None  # side that images of folders are scaled to
    validation_fraction: float | None = None  # as in the training, so that the splits are the same
    test_fraction: float | None = None  # likewise, where the data have no test split
    limit: int | None = None  # most training samples (bytes of text)
    # of images in files: one that cannot be read is an error, or is left out
    on_bad_sample: Literal["refuse", "skip"] | None = None
    json: bool = False  # print JSON


def evaluate(arguments: list[str]) -> int:
    """Print the metric of a trained model: formix eval DIR --data=NAME."""
    from formix import load
    from formix.evaluation.suitable import as_trained, check_data, check_labels
    from formix.training import evaluate as measure
    from formix.training.job import trained_model
    from formix.training.parallel import joined, process_count

    config = parse_model(EvalConfig, "eval", arguments)
    if config.batch_size < 1:
        raise ValueError(f"batch_size is {config.batch_size}; it must be 1 or more.")
    directory, trained = trained_model(Path(config.model))
    model = load(directory)
    if not trained and config.data is None:
        raise ValueError(f"{directory} does not say what data it is for; give --data.")
    job = _job(config, trained, model, directory)
    data = job.load_data()
    own_data = bool(trained) and job.data == trained["data"]
    if not own_data:
        data = as_trained(model, data)
    if job.tokenizer is not None:
        _check_tokenizer(data.tokenizer, job.tokenizer, directory)
    name = f"The model in {directory}"
    check_data(model, data, name, own=job.tokenizer is not None or "tokenizer" in trained)
    check_labels(model, data, name)
    with joined():  # several processes share the work
        value = measure(model, data, config.split, batch_size=config.batch_size)
        first = process_count()[0] == 0
    if not first:
        return 0
    figures = {
        "metric": data.metric,
        "split": config.split,
        "value": value,
        "samples": len(getattr(data, config.split)),
        "skipped": data.provenance.get("skipped", {}),  # of the splits that the data name
    }
    if config.json:
        print(json.dumps(plain(figures)))
    else:
        print(f"{data.metric} on {config.split} ({figures['samples']} samples): {value:.4f}; chance {data.chance:.4f}")
    return 0


def _job(config: EvalConfig, trained: dict[str, Any], model: Any, directory: Path) -> JobConfig:
    """The settings of the data: those asked for, else those of the training, as far as they are about the model. Text
    is read with the tokenizer beside the weights, unless the run's settings make the same tokens.

    Raises:
        ValueError: data of another kind than the model's, or whose vocabulary would be another.
    """
    from formix.data import TEXTS
    from formix.data.text import own_tokenizer
    from formix.evaluation.suitable import check_source, image_side
    from formix.models.text import task_of
    from formix.training.job import JobConfig

    fields = {f.name for f in dataclasses.fields(JobConfig)} - {"model"}
    asked = {k: v for k, v in dataclasses.asdict(config).items() if k in fields and v is not None}
    same = config.data in (None, trained.get("data"))
    settings = {k: v for k, v in trained.items() if k in fields and (same or k in READING)} | asked
    source, task = settings["data"].partition(":")[0], task_of(model)
    length = settings.get("sequence_length", JobConfig.sequence_length)
    check_source(model, settings["data"], f"The model in {config.model}", sequence_length=length)
    if task == "masked-lm":
        settings.setdefault("task", task)
    elif task == "image-classification" and not same:
        settings.setdefault("img_size", image_side(model))
    changed = [name for name in WORDS if settings.get(name) != trained.get(name)]
    of_sentences = source == "glue" and bool(trained) and settings.get("tokenizer") is None
    if source in TEXTS and (not trained or (of_sentences and changed)):
        settings["tokenizer"] = settings.get("tokenizer") or own_tokenizer(directory)
    if of_sentences and changed and settings["tokenizer"] is None:
        raise ValueError(
            f"The model in {config.model} was trained with a vocabulary of the sentences of {trained['data']!r}, "
            f"and another {changed[0]} makes another one; train it with a --tokenizer to use it elsewhere."
        )
    return JobConfig(**settings)


def _check_tokenizer(tokenizer: Any, place: str, directory: Path) -> None:
    """ValueError for another tokenizer than the one that lies beside the model's weights, where one does."""
    from formix.data.text import load_tokenizer, tokenizer_identity

    if not (directory / "tokenizer.json").is_file() or Path(place).resolve() == directory.resolve():
        return
    if tokenizer_identity(tokenizer) != tokenizer_identity(load_tokenizer(str(directory))):
        raise ValueError(
            f"The tokenizer in {place} is not the one in {directory}, which the model was trained with; give "
            f"--tokenizer={directory}."
        )
