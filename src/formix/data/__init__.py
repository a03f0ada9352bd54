"""Readers of the formats users have, by name: `load_data("digits")`, `load_data("folder:pictures")`.

Each returns `Data`: train, validation and test splits of ready batches, the metric to report and its chance level.
"""

from __future__ import annotations

from collections.abc import Callable

from formix.data.base import Batch, BatchDataset, Data, OnBadSample, Request, collate
from formix.data.folder import load_folder
from formix.data.glue import load_glue
from formix.data.hub import load_hub
from formix.data.images import load_cifar, load_digits, load_fashion_mnist
from formix.data.stream import load_stream
from formix.data.text import load_stdlib, load_text

__all__ = ["Batch", "BatchDataset", "Data", "OnBadSample", "collate", "list_data", "load_data"]

SOURCES: dict[str, tuple[Callable[[Request], Data], str]] = {
    "digits": (load_digits, "1,797 handwritten digits, 1 x 8 x 8, 10 classes, from scikit-learn; no download"),
    "fashion-mnist": (load_fashion_mnist, "70,000 pictures of clothing, 1 x 28 x 28, 10 classes; Debian or download"),
    "cifar10": (load_cifar, "60,000 photographs, 3 x 32 x 32, 10 classes; torchvision's download"),
    "cifar100": (load_cifar, "60,000 photographs, 3 x 32 x 32, 100 classes; torchvision's download"),
    "folder:PATH": (load_folder, "your pictures: a folder or .tar with train/CLASS and val/CLASS, or CLASS alone"),
    "stream:PATH": (load_stream, "such a folder of any size: listed once to disk, decoded when read"),
    "stdlib": (load_stdlib, "language modelling on the sources of the running Python; no download"),
    "text:PATH": (load_text, "language modelling on your text: a file, several with commas, or a folder of *.txt"),
    "glue:DIR/TASK": (load_glue, "sentences in GLUE's official TSV layout; TASK is CoLA, SST-2, RTE or STS-B"),
    "hf:NAME": (load_hub, "images with labels, or text, through the datasets library; pip install formix[hf]"),
}
FILES = ("folder", "stream", "hf")  # where single samples may be unreadable
TEXTS = ("stdlib", "text", "glue")
IMAGES = ("digits", "fashion-mnist", "cifar10", "cifar100", "folder", "stream")


def list_data() -> dict[str, str]:
    """The names that `load_data` takes, each with one line on what it is."""
    return {name: description for name, (_, description) in SOURCES.items()}


def load_data(
    name: str,
    *,
    sequence_length: int = 128,
    tokenizer: str | None = None,
    img_size: int | None = None,
    validation_fraction: float | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    limit: int | None = None,
    on_bad_sample: OnBadSample = "refuse",
    labelled: bool = True,
) -> Data:
    """Load a data set by name; `list_data()` lists the names.

    Args:
        name: one of `list_data()`, with PATH, DIR/TASK or NAME filled in.
        sequence_length: targets of a language-modelling window, or the most tokens of a sentence or pair.
        tokenizer: a transformers directory. None: bytes for language modelling, a vocabulary of the data for GLUE.
        img_size: the side of the square that images are scaled to. None: as they are (64 where they differ in size).
        validation_fraction: of the samples that are divided (the training split, where a test split is given).
            None: 0.1, and 5,000 images of Fashion-MNIST.
        test_fraction: the same for test, where no test split is given. None: 0.1, and 0.2 of digits.
        seed: draws the splits that are random, and the samples of `limit`.
        limit: keep that many training samples, or bytes of training text.
        on_bad_sample: of images in files, what becomes of one that cannot be read. "refuse": a ValueError names it.
            "skip": all are read once when the data are opened, and those that cannot be are left out, at most a tenth
            of each split that the data name; a warning names some, and `provenance["skipped"]` counts them.
        labelled: False for what reads no labels: the images of a folder may lie in it without classes, or in one.

    Raises:
        ValueError: for whatever is wrong with these or the files: one sentence, what was given and what is allowed.
    """
    kind, _, argument = name.partition(":")
    sources = {source.partition(":")[0]: source for source in SOURCES}
    if kind not in sources or (":" in sources[kind]) != bool(argument):
        raise ValueError(f"Unknown data {name!r}; known are {', '.join(SOURCES)}.")
    if kind in IMAGES and tokenizer is not None:
        raise ValueError(f"tokenizer={tokenizer!r} is for text, and {name!r} is images; leave it out.")
    if kind not in (*IMAGES, "hf") and img_size is not None:
        raise ValueError(f"img_size={img_size} is for images, and {name!r} is text; leave it out.")
    if kind not in FILES and on_bad_sample == "skip":
        raise ValueError(
            f"on_bad_sample='skip' is for images in files ({', '.join(FILES)}), not {name!r}; leave it out."
        )
    load, _ = SOURCES[sources[kind]]
    return load(
        Request(
            name=name,
            sequence_length=sequence_length,
            tokenizer=tokenizer,
            img_size=img_size,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            seed=seed,
            limit=limit,
            on_bad_sample=on_bad_sample,
            labelled=labelled,
        )
    )
