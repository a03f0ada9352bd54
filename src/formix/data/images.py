"""Image classification: scikit-learn's digits, Fashion-MNIST, CIFAR, and what all image sources share."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from formix.data.base import SPLITS, Batch, BatchDataset, Data, Request, majority_accuracy

MEMORY_LIMIT = 4 * 2**30  # bytes of pixels that a data set held in memory may have
DAMAGE = (AssertionError, KeyError, ValueError)  # what torchvision raises for a file that is cut short
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


class Pixels(Protocol):
    """uint8 images [N, C, H, W], indexed with a list of rows: a tensor, or files decoded when read."""

    @property
    def shape(self) -> Sequence[int]: ...
    def __getitem__(self, indices: Any, /) -> Tensor: ...


class ImageDataset(BatchDataset):
    """Images `pixels` uint8 [N, C, H, W] and `labels` [N]; batches are (pixels - mean) / std, with mean, std [C].

    `uncut` are the same images whole (`formix.data.encoded.DecodedWhenRead`), where pixels may be a part of them.
    """

    def __init__(self, pixels: Pixels, labels: Tensor, mean: Tensor, std: Tensor, uncut: Any = None) -> None:
        self.pixels, self.labels, self.uncut = pixels, labels.long(), uncut
        self.scale = (1 / std)[:, None, None]  # [C, 1, 1]
        self.shift = (-mean / std)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        pixels = self.pixels[list(indices)].float().mul_(self.scale).add_(self.shift)  # [B, C, H, W]
        return {"pixel_values": pixels, "labels": self.labels[list(indices)]}

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> ImageDataset:
        """The same images under a pretrained model's statistics, of pixels 0 to 1, one per channel; grey images are
        repeated to as many channels. ValueError where the channels do not fit."""
        channels = self.pixels.shape[1]
        if channels not in (1, len(mean)):
            raise ValueError(f"The images have {channels} channels and the statistics {len(mean)}; they must agree.")
        pixels = self.pixels
        if channels != len(mean):
            assert isinstance(pixels, Tensor)  # only RGB is decoded when read
            pixels = pixels.expand(-1, len(mean), -1, -1)
        return ImageDataset(pixels, self.labels, torch.tensor(mean) * 255, torch.tensor(std) * 255, self.uncut)


def image_data(
    name: str,
    splits: Sequence[tuple[Pixels, Tensor]],
    class_names: Sequence[str],
    provenance: dict[str, Any],
) -> Data:
    """Data from (uint8 [N, C, H, W], labels [N]) for train, validation and test, normalised by train's statistics."""
    (train_pixels, train_labels), _, (_, test_labels) = splits
    mean, std = _channel_statistics(train_pixels)
    train, validation, test = (ImageDataset(pixels, labels, mean, std) for pixels, labels in splits)
    _, channels, height, width = train_pixels.shape
    digest = hashlib.sha256()
    for pixels, labels in splits:
        digest.update(labels.numpy().data)
        if isinstance(pixels, Tensor):
            digest.update(pixels.numpy().data)
    return Data(
        name=name,
        task="image-classification",
        train=train,
        validation=validation,
        test=test,
        metric="accuracy",
        higher_is_better=True,
        chance=majority_accuracy(train_labels.long(), test_labels.long()),
        num_classes=len(class_names),
        class_names=tuple(class_names),
        in_chans=channels,
        img_size=(height, width),
        provenance={
            **provenance,
            "counts": {split: len(labels) for split, (_, labels) in zip(SPLITS, splits, strict=True)},
            "normalisation": {"mean": mean.tolist(), "std": std.tolist(), "of": "pixels 0 to 255, training split"},
            "sha256": digest.hexdigest(),  # of the labels and, where they are in memory, the pixels, split by split
        },
    )


def resized(pixels: Tensor, request: Request) -> Tensor:
    """`pixels` uint8 [N, C, H, W] scaled to the square asked for (bilinear, antialiased), or as they are."""
    size = request.img_size
    if size is None or pixels.shape[2:] == (size, size):
        return pixels
    if (needed := pixels.shape[0] * pixels.shape[1] * size**2) > MEMORY_LIMIT:
        raise ValueError(
            f"img_size={size} would make {request.name!r} {needed / 2**30:.0f} GiB large, and it is held in memory, "
            f"at most {MEMORY_LIMIT // 2**30} GiB; choose a smaller img_size."
        )
    from torchvision.transforms.v2.functional import resize

    return torch.cat([resize(chunk, [size, size], antialias=True) for chunk in pixels.split(1024)])


def load_digits(request: Request) -> Data:
    """scikit-learn's 1,797 digits, 1 x 8 x 8, 10 classes; a stratified split drawn with the seed, test 0.2."""
    from sklearn.datasets import load_digits as read_digits

    digits = read_digits()
    pixels = torch.from_numpy((digits.images * 15).astype(np.uint8))[:, None]  # 0 to 16 becomes 0 to 240, [N, 1, 8, 8]
    labels = torch.from_numpy(digits.target)
    rows = request.divide(len(labels), digits.target, ("validation", "test"), test=0.2)
    pixels = resized(pixels, request)
    return image_data(
        request.name,
        [(pixels[rows[split]], labels[rows[split]]) for split in SPLITS],
        [str(name) for name in digits.target_names],
        {
            "source": "scikit-learn, sklearn.datasets.load_digits",
            "licence": "CC BY 4.0, UCI Optical Recognition of Handwritten Digits",
            "preprocessing": f"a stratified split drawn with seed {request.seed}",
        },
    )


def load_fashion_mnist(request: Request) -> Data:
    """Fashion-MNIST, 1 x 28 x 28, 10 classes, from Debian's package or torchvision's download; the official test split.

    ValueError if neither is there.
    """
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import extract_archive

    if DEBIAN_FASHION_MNIST.is_dir():
        source = "Debian package dataset-fashion-mnist"
        with tempfile.TemporaryDirectory() as root:
            raw = Path(root, "FashionMNIST", "raw")
            raw.mkdir(parents=True)
            try:
                for archive in DEBIAN_FASHION_MNIST.glob("*-ubyte.gz"):
                    extract_archive(archive, raw)
                train, test = FashionMNIST(root, train=True), FashionMNIST(root, train=False)
            except (EOFError, OSError, RuntimeError, *DAMAGE) as error:
                raise ValueError(
                    f"{str(DEBIAN_FASHION_MNIST)!r} is not what the {source} has there; install it again."
                ) from error
    else:
        source = "torchvision.datasets.FashionMNIST"
        advice = "install Debian's package (apt-get install dataset-fashion-mnist) or connect to a network once"
        train, test = _downloaded(FashionMNIST, request.name, advice)
    return _official_test_split(
        request,
        (train.data[:, None], train.targets),
        (test.data[:, None], test.targets),
        train.classes,
        {"source": source, "licence": "MIT, Zalando SE"},
        default_validation=1 / 12,  # 5,000 of 60,000
    )


def load_cifar(request: Request) -> Data:
    """CIFAR-10 or CIFAR-100, 3 x 32 x 32, downloaded once by torchvision; the official test split.

    ValueError if it is not in the cache and cannot be downloaded.
    """
    from torchvision import datasets

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[request.name]
    train, test = _downloaded(reader, request.name, "connect to a network once, or put the files there")
    (train_pixels, test_pixels) = (torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous() for d in (train, test))
    return _official_test_split(
        request,
        (train_pixels, torch.tensor(train.targets)),
        (test_pixels, torch.tensor(test.targets)),
        train.classes,
        {"source": f"torchvision.datasets.{reader.__name__}", "licence": "unstated; Krizhevsky 2009"},
        default_validation=0.1,
    )


def _downloaded(reader: Any, name: str, advice: str) -> tuple[Any, Any]:
    """torchvision's data set, train and test, from the cache or downloaded into it."""
    root = Path(torch.hub.get_dir(), "datasets")
    try:
        return reader(root, train=True, download=True), reader(root, train=False, download=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: all mirrors failed, or a damaged file
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name!r} is not in {root} and its download failed, or a file there is damaged ({reason}); remove such a "
            f"file, and {advice}."
        ) from error
    except DAMAGE as error:
        raise ValueError(f"A file of {name!r} in {root} is damaged; remove it, and {advice}.") from error


def _official_test_split(
    request: Request,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    class_names: Sequence[str],
    provenance: dict[str, Any],
    *,
    default_validation: float,
) -> Data:
    """Data whose validation split is held out of the official training split."""
    (pixels, labels), (test_pixels, test_labels) = train, test
    rows = request.divide(len(labels), labels.numpy(), ("validation",), validation=default_validation)
    how = (
        f"validation held out of the official training split, stratified, seed {request.seed}; the official test split"
    )
    return image_data(
        request.name,
        [
            (resized(pixels[rows["train"]], request), labels[rows["train"]]),
            (resized(pixels[rows["validation"]], request), labels[rows["validation"]]),
            (resized(test_pixels, request), test_labels),
        ],
        class_names,
        {**provenance, "preprocessing": how},
    )


def _channel_statistics(pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C]: of all images in memory, else of about 2,000 evenly spaced ones."""
    count, channels, height, width = pixels.shape
    rows = torch.arange(0, count, 1 if isinstance(pixels, Tensor) else max(1, count // 2000))
    total, squares = torch.zeros(2, channels, dtype=torch.float64)
    for chunk in rows.split(max(1, 2**24 // (channels * height * width))):  # 64 MiB as float32
        values = pixels[chunk.tolist()].float()  # [B, C, H, W]
        total += values.sum((0, 2, 3))
        squares += values.square_().sum((0, 2, 3))
    mean = total / (len(rows) * height * width)
    variance = squares / (len(rows) * height * width) - mean**2
    return mean.float(), variance.clamp(min=1).sqrt().float()  # a constant channel is centred, not divided by 0
