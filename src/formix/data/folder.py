"""Image classification on the user's own pictures: a tree with one folder per class, on disk or in a .tar."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formix.data.base import SPLITS, Data, Request, pass_over, split_of
from formix.data.encoded import EncodedImage, ListedImages
from formix.data.images import ImageDataset, Pixels, image_data
from formix.data.unreadable import count_skipped, readable, refuse_loss

MEMORY_LIMIT = 2**30  # bytes of decoded pixels up to which images are kept; above, each is decoded when it is read
BY_CLASS = "a folder per class"  # and no splits
NO_CLASS = "images in no class"
DEFAULT_SIZE = 64  # side, where the images differ in size and no img_size is given


def load_folder(request: Request) -> Data:
    """`folder:PATH`, a folder or an uncompressed .tar of one.

    With train/CLASS/* and val/CLASS/* (or test/), that split is the test set and validation is held out of train; with
    all three, each is what its name says; with CLASS/* alone, validation and test are both held out, stratified. RGB;
    scaled by the shorter side and cut to the centre. ValueError for a path that does not exist, no images, fewer than
    two classes, a class without images or that train lacks, or an image that cannot be read. Where no labels are asked
    for, there may be one class, or none: then validation and test are held out of all images.
    """
    tree, folders = picture_tree(Path(request.argument))
    by_split, how = _splits(tree, request)
    depth = 1 if how in (BY_CLASS, NO_CLASS) else 2
    with_images = {path.parts[:depth] for path in tree}
    classes = {path.parts for path in folders if len(path.parts) == depth and not path.name.startswith(".")}
    for parts in sorted(classes - with_images):
        if how != NO_CLASS and (depth == 1 or split_of(parts[0])):
            raise empty_class(request.name, "/".join(parts))
    class_names = sorted({label for _, label in by_split["train"]})
    index = {label: i for i, label in enumerate(class_names)}
    for split, samples in by_split.items():
        if unknown := sorted({label for _, label in samples} - index.keys()):
            raise ValueError(
                f"The {split} split of {request.name!r} has the class {unknown[0]!r}, which train lacks; that has "
                f"{', '.join(class_names[:10])}{' ...' if len(class_names) > 10 else ''}: rename or remove the folder."
            )
    if len(class_names) < 2 and request.labelled:
        raise ValueError(f"{request.name!r} has one class only, {class_names[0]!r}; at least two are needed.")
    files = {split: [file for file, _ in samples] for split, samples in by_split.items()}
    labels = {split: np.array([index[label] for _, label in samples]) for split, samples in by_split.items()}
    provenance = {"source": request.argument, "licence": "the user's own files", "preprocessing": how}
    return encoded_image_data(request, files, labels, class_names, provenance)


def empty_class(name: str, folder: str) -> ValueError:
    """What torchvision's ImageFolder refuses too: a class that nothing can be learned of, or whose images got lost."""
    return ValueError(f"The class {folder!r} of {name!r} has no images; add some, or remove its folder.")


def encoded_image_data(
    request: Request,
    files: Mapping[str, Sequence[EncodedImage]],
    labels: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    provenance: dict[str, Any],
) -> Data:
    """Data from encoded images by split; train is there, validation and test are held out of it where they are not.

    With `on_bad_sample="skip"` those that cannot be read are left out before.
    """
    provenance, skipped = dict(provenance), dict[str, list[str]]()
    if request.on_bad_sample == "skip":
        files, labels, skipped = _readable_ones(request.name, files, labels, class_names)
        provenance["skipped"] = count_skipped(request.name, skipped)
    absent = [split for split in SPLITS if split not in files]
    rows = request.divide(len(files["train"]), labels["train"], absent, classes=class_names)
    files = {split: [files["train"][i] for i in rows[split]] if split in rows else files[split] for split in SPLITS}
    labels = {split: labels["train"][rows[split]] if split in rows else labels[split] for split in SPLITS}
    everything = [file for split in SPLITS for file in files[split]]
    common = None if request.img_size else _common_size(everything)
    size = common or (request.img_size or DEFAULT_SIZE,) * 2
    in_memory = len(everything) * 3 * size[0] * size[1] <= MEMORY_LIMIT
    reader = _decode_all if in_memory else ListedImages
    splits: list[tuple[Pixels, Tensor]] = [(reader(files[s], size), torch.from_numpy(labels[s])) for s in SPLITS]
    steps = [
        provenance["preprocessing"],
        *([f"{' and '.join(absent)} held out of train, stratified, seed {request.seed}"] if absent else []),
        f"RGB, shorter side scaled and centre cut to {size[0]} x {size[1]}",
        "decoded once" if in_memory else "decoded when read",
    ]
    data = image_data(request.name, splits, class_names, {**provenance, "preprocessing": "; ".join(steps)})
    if size != common:
        assert isinstance(data.train, ImageDataset)
        data.train.uncut = ListedImages(files["train"], size)
    names = [] if in_memory else [file.name for file in everything]
    left_out = {split: skipped[split] for split in skipped if skipped[split]}
    if names or left_out:  # pixels that are not in memory are not in the hash
        content = f"{data.provenance['sha256']} {left_out} {names}"
        data.provenance["sha256"] = hashlib.sha256(content.encode()).hexdigest()
    return data


def _readable_ones(
    name: str,
    files: Mapping[str, Sequence[EncodedImage]],
    labels: Mapping[str, np.ndarray],
    class_names: Sequence[str],
) -> tuple[dict[str, list[EncodedImage]], dict[str, np.ndarray], dict[str, list[str]]]:
    """The readable images by split, their labels, and the names of the others; ValueError if those are too many."""
    kept, kept_labels, skipped = {}, {}, {}
    for split, images in files.items():
        good = np.fromiter(readable(images), dtype=bool, count=len(images))
        kept[split], kept_labels[split] = [images[i] for i in np.flatnonzero(good).tolist()], labels[split][good]
        bad = [(images[i].name, int(labels[split][i])) for i in np.flatnonzero(~good).tolist()]
        refuse_loss(name, split, bad, Counter(kept_labels[split].tolist()), class_names)
        skipped[split] = [file for file, _ in bad]
    return kept, kept_labels, skipped


def picture_tree(root: Path) -> tuple[dict[PurePosixPath, EncodedImage], set[PurePosixPath]]:
    """Every image below the root, a folder or a .tar, by its path from there, sorted, and every folder; those around
    the whole tree are passed over. ValueError if there is no image."""
    from PIL import Image
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not root.exists():
        raise ValueError(f"{str(root)!r} does not exist; give a folder, or a .tar, that holds a folder per class.")
    found: dict[PurePosixPath, EncodedImage] = {}
    folders: set[PurePosixPath] = set()
    links: dict[PurePosixPath, PurePosixPath] = {}  # of a .tar, to what they lead to
    if root.is_dir():
        for folder, _, names in os.walk(root, followlinks=True):
            folders.add(PurePosixPath(Path(folder).relative_to(root)))
            for path in (Path(folder, name) for name in names):
                found[PurePosixPath(path.relative_to(root))] = EncodedImage(str(path), path.read_bytes)
    else:
        try:
            with tarfile.open(root, "r:") as archive:
                for member in archive:
                    place = PurePosixPath(member.name)
                    if member.isdir():
                        folders.add(place)
                    elif member.isfile():
                        read = partial(_read_part, root, member.offset_data, member.size)
                        found[place] = EncodedImage(f"{root}/{place}", read)
                    elif member.islnk():
                        links[place] = PurePosixPath(member.linkname)
                    elif member.issym():
                        links[place] = PurePosixPath(os.path.normpath(place.parent / member.linkname))
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{str(root)!r} is neither a folder nor an uncompressed .tar ({error}).") from error
    for place, target in links.items():
        if target in found:
            found[place] = EncodedImage(f"{root}/{place}", found[target].read)
    found = {p: f for p, f in found.items() if not any(part.startswith(".") for part in p.parts)}
    images = {p: f for p, f in found.items() if p.suffix.lower() in IMG_EXTENSIONS}
    if not images:
        raise ValueError(f"{str(root)!r} holds no images ({', '.join(IMG_EXTENSIONS)}).")
    known = Image.registered_extensions()
    others = [p for p in found if p not in images and p.suffix.lower() in known]
    pass_over(root, others, "of other formats", f"; folders are searched for {', '.join(IMG_EXTENSIONS)}")
    pass_over(root, [place for place in links if place not in found], "links to what it does not hold")
    while all(len(p.parts) > 2 for p in images) and len(tops := {p.parts[0] for p in images}) == 1:
        if split_of(*tops) and not all(split_of(p.parts[1]) for p in images):
            break
        folders = {PurePosixPath(*p.parts[1:]) for p in folders if p.parts[:1] == (*tops,)}
        images = {PurePosixPath(*p.parts[1:]): f for p, f in images.items()}
    return dict(sorted(images.items())), folders


def _read_part(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _splits(
    tree: dict[PurePosixPath, EncodedImage], request: Request
) -> tuple[dict[str, list[tuple[EncodedImage, str]]], str]:
    """(image, class) of the splits that the tree names, always train, and which they are in words."""
    named: dict[str, list[tuple[EncodedImage, str]]] = {}
    tops, how = named_splits(request.name, {path.parts[0] for path in tree if len(path.parts) > 2})
    for split, top in tops.items():
        named[split] = [(f, p.parts[1]) for p, f in tree.items() if p.parts[0] == top and len(p.parts) > 2]
    if not named and (samples := [(file, path.parts[0]) for path, file in tree.items() if len(path.parts) > 1]):
        named["train"] = samples
    if not named and not request.labelled:
        return {"train": [(file, "unlabelled") for file in tree.values()]}, NO_CLASS
    if not named:
        raise ValueError(f"{request.name!r} has images but no classes; put the images of each class in a folder.")
    depth = 2 if tops else 1
    outside = [p for p in tree if len(p.parts) <= depth or (tops and p.parts[0] not in tops.values())]
    pass_over(request.argument, outside, "images in no class" + (" of a split" if tops else ""))
    return named, how


def named_splits(name: str, folders: Iterable[str]) -> tuple[dict[str, str], str]:
    """The folder of each split, by the names of the folders below the root, and which these are in words.

    One for validation or for test alone is the test split. There are none where no name says a split. ValueError if
    two say the same, or none is for training.
    """
    tops: dict[str, str] = {}
    for folder in sorted(folders):
        if (split := split_of(folder)) is None:
            continue
        if split in tops:
            raise ValueError(f"{name!r} has the folders {tops[split]} and {folder} for {split}; keep one.")
        tops[split] = folder
    if not tops:
        return {}, BY_CLASS
    if "train" not in tops:
        raise ValueError(f"{name!r} has {' and '.join(sorted(tops.values()))} but no train to learn from; add it.")
    if len(tops) == 3:
        return {split: tops[split] for split in SPLITS}, f"{', '.join(tops[s] for s in SPLITS)} as named"
    if len(tops) == 1:
        return tops, f"{tops['train']} as named"
    held = tops["validation" if "validation" in tops else "test"]
    return {"train": tops["train"], "test": held}, f"{held} is the test set"


def _common_size(files: Sequence[EncodedImage]) -> tuple[int, int] | None:
    """Height and width, if all images agree."""
    sizes = {file.open().size[::-1] for file in files}
    return sizes.pop() if len(sizes) == 1 else None


def _decode_all(files: Sequence[EncodedImage], size: tuple[int, int]) -> Tensor:
    pixels = torch.empty(len(files), 3, *size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:  # PIL releases the interpreter's lock
        for index, image in enumerate(pool.map(lambda file: file.decode(size), files)):
            pixels[index] = image
    return pixels
