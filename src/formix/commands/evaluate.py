"""`formix eval`: the metric of a saved model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from formix.commands.arguments import parse

if TYPE_CHECKING:
    from formix.data import Data


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The metric of a model on a split; what is left out is taken from the run that the directory is of."""

    model: str  # a training run's directory, or one that formix saved a model in
    data: str | None = None  # a name of `formix data`
    split: Literal["test", "validation", "train"] = "test"
    batch_size: int = 256  # samples at a time
    task: Literal["masked-lm"] | None = None  # None: what the data are for
    mask_probability: float | None = None  # of masked-lm
    sequence_length: int | None = None  # tokens of a window or sentence
    tokenizer: str | None = None  # a transformers tokenizer directory
    img_size: int | None = None  # side that images of folders are scaled to
    validation_fraction: float | None = None  # as in the training, so that the splits are the same
    test_fraction: float | None = None
    limit: int | None = None  # most training samples (bytes of text)
    on_bad_sample: Literal["refuse", "skip"] | None = (
        None  # of images in files: one that cannot be read is an error, or is left out
    )
    json: bool = False  # print JSON


def evaluate(arguments: list[str]) -> int:
    """Print the metric of a trained model: formix eval DIR --data=NAME."""
    from formix import load
    from formix.training import evaluate as measure
    from formix.training.job import JobConfig, OutputDirectory

    named = [f"--model={a}" for a in arguments[:1] if not a.startswith("-")]
    config = parse(EvalConfig, "eval", [*named, *arguments[len(named) :]])
    if config.batch_size < 1:
        raise ValueError(f"batch_size is {config.batch_size}; it must be 1 or more.")
    directory, trained = Path(config.model), {}
    if (directory / "checkpoints").is_dir():
        out = OutputDirectory(directory)
        directory, trained = out.model, json.loads(out.config.read_text())
        if not directory.is_dir():
            raise ValueError(
                f"{out.path} has no model yet; finish its training, or give a checkpoint's model directory."
            )
    elif config.data is None:
        raise ValueError(f"{directory} does not say what data it is for; give --data.")
    fields = {f.name for f in dataclasses.fields(JobConfig)}
    asked = {k: v for k, v in dataclasses.asdict(config).items() if k in fields and k != "model" and v is not None}
    same = config.data is None or config.data == trained.get("data")
    known = {k: v for k, v in trained.items() if k in fields and k != "model" and (same or k == "sequence_length")}
    job = JobConfig(**{**known, **asked})
    data = job.load_data()
    model = load(directory)
    _check(model, data, directory)
    value = measure(model, data, config.split, batch_size=config.batch_size)
    figures = {
        "metric": data.metric,
        "split": config.split,
        "value": value,
        "samples": len(getattr(data, config.split)),
        "skipped": data.provenance.get("skipped", {}),  # of the splits that the data name
    }
    if config.json:
        print(json.dumps(figures))
    else:
        print(f"{data.metric} on {config.split} ({figures['samples']} samples): {value:.4f}; chance {data.chance:.4f}")
    return 0


def _check(model: Any, data: Data, directory: Path) -> None:
    """ValueError where the model's output is not what the data ask for."""
    config = getattr(model, "config", None)
    if data.task in ("causal-lm", "masked-lm"):
        has, needs, what = getattr(config, "vocab_size", None), data.vocab_size, "tokens"
        fits = has is not None and needs is not None and has >= needs
    else:
        images = data.task == "image-classification"
        has = getattr(model, "num_classes", None) if images else getattr(config, "num_labels", None)
        needs, what = data.num_classes, "classes"
        fits = has == needs
    if not fits:
        raise ValueError(f"The model in {directory} has {has or 'no'} {what} and {data.name!r} has {needs}.")
