"""Image folders of any size: listed once into files on disk, read from there, decoded when an image is used.

Nothing of the list is kept in memory but 8 bytes of label per image, so that folders of many millions of pictures can
be shuffled, sharded and resumed exactly like small ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from formix.data.base import SPLITS, Data, Request, split_of
from formix.data.encoded import DecodedWhenRead, EncodedImage
from formix.data.folder import DEFAULT_SIZE, empty_class, named_splits
from formix.data.images import ImageDataset, image_data
from formix.data.unreadable import CHUNK, count_skipped, readable, refuse_loss

_log = logging.getLogger("formix")
SAMPLED = 256  # images whose sizes are looked at
# the files of a split's N images: their names one after the other, where each begins [N + 1], and their labels [N]
PARTS: dict[str, type] = {"names": np.uint8, "offsets": np.int64, "labels": np.int32}
SUMS = "sums.json"  # the SHA-256 of each file of an index
Index = dict[str, np.ndarray]


class StreamedImages(DecodedWhenRead):
    """Images [N, 3, H, W] behind an index on disk."""

    def __init__(self, index: Index, rows: np.ndarray | None, root: Path, size: tuple[int, int]) -> None:
        self.index, self.rows, self.root, self.size = index, rows, root, size
        count = len(index["labels"]) if rows is None else len(rows)
        self.shape = (count, 3, *size)

    def file(self, index: int) -> EncodedImage:
        row = index if self.rows is None else int(self.rows[index])
        begin, end = self.index["offsets"][row : row + 2]
        return _file(self.root, os.fsdecode(self.index["names"][begin:end].tobytes()))


def load_stream(request: Request) -> Data:
    """`stream:PATH`, a folder with train/CLASS/* and val/CLASS/* (or test/), or CLASS/* alone.

    Splits are those of `folder:PATH`; what is missing is held out of train by a hash of each file's name, so that no
    list is needed for it. Images lie directly in their class's folder. The index goes to formix's cache
    (`FORMIX_CACHE`, else ~/.cache/formix) and is made anew when a folder has changed or the index is damaged. With
    `on_bad_sample="skip"` all images are read when it is made, and it lacks those that cannot be. ValueError for a path
    that is no such folder, or a class without images.
    """
    root = Path(request.argument)
    splits, how = _folders(root)
    names = _class_names(root / splits["train"])
    for folder in (Path(part, name) for part in splits.values() for name in _class_names(root / part)):
        if not any(map(_is_image, os.scandir(root / folder))):
            raise empty_class(request.name, folder.as_posix())
    index, digest, skipped = _index(root, splits, request)
    rows = None
    if request.limit is not None and request.limit < (count := len(index["train"]["labels"])):
        rows = np.sort(np.random.default_rng(request.seed).permutation(count)[: request.limit])
    size = (request.img_size, request.img_size) if request.img_size else _common_size(index["train"], root)
    parts = []
    for split in SPLITS:
        kept = rows if split == "train" else None
        labels = index[split]["labels"] if kept is None else index[split]["labels"][kept]
        parts.append((StreamedImages(index[split], kept, root, size), torch.from_numpy(labels.astype(np.int64))))
    provenance: dict[str, Any] = {
        "source": request.argument,
        "licence": "the user's own files",
        "preprocessing": f"{how}; RGB, shorter side scaled and centre cut to {size[0]} x {size[1]}, when read",
    }
    if request.on_bad_sample == "skip":
        provenance["skipped"] = count_skipped(request.name, skipped)
    data = image_data(request.name, parts, names, provenance)
    assert isinstance(data.train, ImageDataset)
    data.train.uncut = data.train.pixels
    data.provenance["sha256"] = digest  # of the names and labels; the pixels are not read for it
    return data


def _folders(root: Path) -> tuple[dict[str, str], str]:
    """Where the splits that the folder names lie below it, always train, and which they are in words."""
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is no folder; give one that holds a folder per class.")
    words = (entry.name for entry in os.scandir(root) if entry.is_dir() and split_of(entry.name))
    splits, how = named_splits(str(root), [name for name in words if any(e.is_dir() for e in os.scandir(root / name))])
    return splits or {"train": ""}, how


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise ValueError(f"{str(folder)!r} has {len(names)} folders; at least two classes are needed, one folder each.")
    return names


def _index(root: Path, splits: dict[str, str], request: Request) -> tuple[dict[str, Index], str, dict[str, list[str]]]:
    """The index of every split, mapped from disk, the hash of all of it, and the files that it leaves out."""
    validation, test = request.fractions()
    held = {"test": test, "validation": validation}
    absent = {split: fraction for split, fraction in held.items() if split not in splits}
    folders = [root / part / name for part in splits.values() for name in _class_names(root / part)]
    state = [str(root.resolve()), absent, [(str(f.relative_to(root)), f.stat().st_mtime_ns) for f in folders]]
    if request.on_bad_sample == "skip":
        state.append("readable images alone")
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("FORMIX_CACHE", Path.home() / ".cache" / "formix")) / "index"
    if not _holds(cache / key, root):
        try:
            (cache.parent / "locks").mkdir(parents=True, exist_ok=True)
            cache.mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"The index of {str(root)!r} cannot be written to {cache} ({error.strerror}); name another directory "
                "in the environment variable FORMIX_CACHE."
            ) from None
        with FileLock(cache.parent / "locks" / key):
            if not _holds(cache / key, root):  # else another process was first
                made = Path(tempfile.mkdtemp(dir=cache))
                try:
                    _write(made, root, splits, absent, request)
                    shutil.rmtree(cache / key, ignore_errors=True)
                    made.rename(cache / key)
                finally:
                    shutil.rmtree(made, ignore_errors=True)
    index: dict[str, Index] = {
        split: {part: np.memmap(cache / key / f"{split}.{part}", dtype, "r") for part, dtype in PARTS.items()}
        for split in SPLITS
    }
    return index, (cache / key / "sha256").read_text(), _skipped(cache / key)


def _holds(folder: Path, root: Path) -> bool:
    """Whether there is an intact index, and the files that it leaves out are still unreadable."""
    try:
        sums = json.loads((folder / SUMS).read_text())
        intact = all(_sum(folder / name) == expected for name, expected in sums.items())
    except (OSError, ValueError):
        return False
    return intact and not any(readable(_file(root, path) for files in _skipped(folder).values() for path in files))


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _skipped(folder: Path) -> dict[str, list[str]]:
    """The files, by split, that an index leaves out."""
    path = folder / "skipped.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _write(folder: Path, root: Path, splits: dict[str, str], absent: dict[str, float], request: Request) -> None:
    """List the images once: train's go to an absent split by a hash of their path."""
    digest, skip = hashlib.sha256(), request.on_bad_sample == "skip"
    skipped: dict[str, list[tuple[str, int]]] = {split: [] for split in splits}
    kept: dict[str, Counter[int]] = {split: Counter() for split in splits}
    if skip:
        _log.warning("every image of %s is read once, to find those that cannot be", root)
    with contextlib.ExitStack() as files:
        out = {
            split: {part: files.enter_context((folder / f"{split}.{part}").open("wb")) for part in PARTS}
            for split in SPLITS
        }
        ends = dict.fromkeys(SPLITS, 0)
        for split in SPLITS:
            out[split]["offsets"].write(np.int64(0).tobytes())
        classes = {name: label for label, name in enumerate(_class_names(root / splits["train"]))}
        for given, part in splits.items():
            for path, label, good in _judged(_images(root, part, classes), root, skip):
                name = os.fsencode(path)
                if not good:
                    skipped[given].append((path, label))
                    continue
                split = _chosen(name, absent) if given == "train" else given
                digest.update(name + b"\0")
                ends[split] += len(name)
                kept[given][label] += 1
                out[split]["names"].write(name)
                out[split]["offsets"].write(np.int64(ends[split]).tobytes())
                out[split]["labels"].write(np.int32(label).tobytes())
    for given in splits:
        refuse_loss(request.name, given, skipped[given], kept[given], list(classes))
    for split in SPLITS:
        if not ends[split]:
            raise ValueError(
                f"{str(root)!r} has no images for {split}; a class's folder holds them directly. Add images, or choose "
                f"a larger {split}_fraction if they are held out of train."
            )
    (folder / "sha256").write_text(digest.hexdigest())
    if skip:
        (folder / "skipped.json").write_text(
            json.dumps({split: [path for path, _ in files] for split, files in skipped.items()})
        )
    (folder / SUMS).write_text(json.dumps({path.name: _sum(path) for path in sorted(folder.iterdir())}))


def _judged(images: Iterator[tuple[str, int]], root: Path, skip: bool) -> Iterator[tuple[str, int, bool]]:
    """The images, and whether each is kept."""
    while chunk := list(islice(images, CHUNK)):
        good = readable(_file(root, path) for path, _ in chunk) if skip else repeat(True)
        yield from ((path, label, fine) for (path, label), fine in zip(chunk, good, strict=False))


def _file(root: Path, path: str) -> EncodedImage:
    return EncodedImage(str(root / path), (root / path).read_bytes)


def _images(root: Path, part: str, classes: dict[str, int]) -> Iterator[tuple[str, int]]:
    """(path below the root, label) of a split, class by class; only one class's names are in memory at a time."""
    for name in _class_names(root / part):
        if name not in classes:
            raise ValueError(f"{str(root / part)!r} has the class {name!r}, which train lacks; rename or remove it.")
        for entry in sorted(e.name for e in filter(_is_image, os.scandir(root / part / name))):
            yield os.path.join(part, name, entry), classes[name]


def _is_image(entry: os.DirEntry[str]) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return entry.name.lower().endswith(IMG_EXTENSIONS) and not entry.name.startswith(".")


def _chosen(name: bytes, absent: dict[str, float]) -> str:
    """The split of one of train's images: those absent take their fractions of the hashes in [0, 1)."""
    place, end = int.from_bytes(hashlib.sha256(name).digest()[:4]) / 2**32, 0.0
    for split, fraction in absent.items():
        end += fraction
        if place < end:
            return split
    return "train"


def _common_size(index: Index, root: Path) -> tuple[int, int]:
    """Height and width if the images of a sample agree, else the default square."""
    count = len(index["labels"])
    images = StreamedImages(index, None, root, (1, 1))
    sizes = {images.file(row).open().size[::-1] for row in range(0, count, max(1, count // SAMPLED))}
    return sizes.pop() if len(sizes) == 1 else (DEFAULT_SIZE, DEFAULT_SIZE)
