"""Data sets of the Hugging Face hub, or in its formats on disk, through the datasets library."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from formix.data.base import SPLIT_WORDS, SPLITS, Data, Request
from formix.data.encoded import EncodedImage
from formix.data.folder import encoded_image_data
from formix.data.text import divide_text, text_data


def load_hub(request: Request) -> Data:
    """`hf:NAME`, `hf:NAME:CONFIG`, or `hf:FOLDER` with files that the datasets library reads or saved to disk.

    An image column and a class label make image classification, a text column makes language modelling. A split named
    test is the test set, else the one named validation; what is missing is held out of train. ValueError without the
    datasets library, for what it cannot load, and for other columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{request.name!r} needs the datasets library; pip install formix[hf].") from error

    path, _, config = request.argument.partition(":")
    saved = any(Path(path, name).is_file() for name in ("state.json", "dataset_dict.json"))  # by save_to_disk
    try:
        loaded: Any = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, config or None)
    except Exception as error:  # no network, no such name, a missing config, a broken file: each its own kind
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{request.name!r} could not be loaded by the datasets library ({reason}).") from error
    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    words = {split: word for split in SPLITS for word in SPLIT_WORDS[split] if word in loaded}
    tables = {split: loaded[word] for split, word in words.items()}
    if "train" not in tables:
        raise ValueError(f"{request.name!r} has the splits {', '.join(loaded)}; one named train is needed.")
    features = tables["train"].features
    image = next((column for column, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image and label:
        whole = {split: table for split, table in tables.items() if all(n not in (None, -1) for n in table[label])}
        if "train" not in whole:
            raise ValueError(f"{request.name!r} has rows for training whose {label} is missing; remove them.")
        tables = whole  # test labels are often not published
    elif "text" not in features:
        raise ValueError(
            f"{request.name!r} has the columns {', '.join(f'{c} ({type(k).__name__})' for c, k in features.items())}; "
            "needed are an Image and a ClassLabel, or one named text."
        )
    if "test" not in tables and "validation" in tables:
        tables["test"], words["test"] = tables.pop("validation"), words["validation"]
    how = ", ".join(f"{split} is the data set's {table.split or words[split]}" for split, table in tables.items())
    provenance: dict[str, Any] = {
        "source": f"datasets.load_dataset, {request.argument}",
        "licence": tables["train"].info.license or "see the data set's card",
    }
    if not (image and label):
        if request.on_bad_sample == "skip":
            raise ValueError(f"on_bad_sample='skip' is for images, and {request.name!r} is text; leave it out.")
        texts = {split: "".join(map(_line, table["text"])).encode() for split, table in tables.items()}
        parts, division = divide_text(request, texts)
        return text_data(request, parts, {**provenance, "preprocessing": f"{how}; {division}"})
    files = {}
    for split, table in tables.items():
        encoded = table.select_columns(image).cast_column(image, datasets.Image(decode=False))
        files[split] = [
            EncodedImage(f"{request.name} {split} {row}", partial(_image_bytes, encoded, row, image))
            for row in range(len(encoded))
        ]
    labels = {split: np.array(table[label], dtype=np.int64) for split, table in tables.items()}
    return encoded_image_data(request, files, labels, features[label].names, {**provenance, "preprocessing": how})


def _image_bytes(table: Any, row: int, column: str) -> bytes:
    stored = table[row][column]
    if stored is None:
        raise ValueError("its cell is empty")
    return stored["bytes"] or Path(stored["path"]).read_bytes()


def _line(text: str | None) -> str:
    text = text or ""  # a cell of a table that is empty is None
    return text if text.endswith("\n") else text + "\n"
