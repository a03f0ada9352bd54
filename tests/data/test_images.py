"""digits, Fashion-MNIST and CIFAR."""

import gzip
import struct
from itertools import chain
from urllib.error import URLError

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from formix.data import images, load_data


def pixels(dataset) -> torch.Tensor:
    return dataset.__getitems__(range(len(dataset)))["pixel_values"]


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def fashion():
    if not images.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    return load_data("fashion-mnist")


def test_digits_in_numbers(digits):
    assert (digits.num_classes, digits.in_chans, digits.img_size) == (10, 1, (8, 8))
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1258, 180, 359)
    assert (digits.task, digits.metric, digits.higher_is_better) == ("image-classification", "accuracy", True)
    batch = digits.train.__getitems__([0, 1])
    assert (batch["pixel_values"].dtype, batch["pixel_values"].shape) == (torch.float32, (2, 1, 8, 8))
    assert (batch["labels"].dtype, batch["labels"].shape) == (torch.int64, (2,))


def test_digits_are_divided_without_overlap_or_loss(digits):
    splits = (digits.train, digits.validation, digits.test)
    mean, std = (digits.provenance["normalisation"][key][0] for key in ("mean", "std"))
    restored = [(pixels(split) * std + mean).div(15).round().int().flatten(1).tolist() for split in splits]
    assert sorted(chain.from_iterable(restored)) == sorted(
        load_digits().data.astype(int).tolist()
    )  # digits has no two alike


def test_digits_are_stratified(digits):
    whole = np.bincount(load_digits().target) / 1797
    for split in (digits.train, digits.validation, digits.test):
        assert np.abs(np.bincount(split.labels) / len(split) - whole).max() < 0.01


def test_train_is_normalised(digits):
    assert pixels(digits.train).mean().abs() < 1e-5
    assert (pixels(digits.train).std() - 1).abs() < 1e-3


def test_chance_is_the_majority_class(digits):
    majority = np.bincount(digits.train.labels).argmax()
    assert digits.chance == pytest.approx(np.mean(digits.test.labels.numpy() == majority))


def test_another_seed_divides_differently(digits):
    assert load_data("digits", seed=1).provenance["sha256"] != digits.provenance["sha256"]


def test_a_smaller_limit_takes_a_subset(digits):
    def samples(limit):
        data = load_data("digits", limit=limit)
        assert len(data.validation) == 180  # validation and test are never cut
        return {bytes(image.numpy().tobytes()) for image in data.train.pixels}

    few, more = samples(50), samples(100)
    assert len(few) == 50
    assert few < more
    assert len(samples(10_000)) == 1258


def test_img_size_scales(digits):
    larger = load_data("digits", img_size=16)
    assert larger.img_size == (16, 16)
    back = torch.nn.functional.avg_pool2d(pixels(larger.test), 2)
    assert torch.corrcoef(torch.stack([back.flatten(), pixels(digits.test).flatten()]))[0, 1] > 0.95


def test_fashion_mnist_in_numbers(fashion):
    assert (len(fashion.train), len(fashion.validation), len(fashion.test)) == (55_000, 5_000, 10_000)
    assert (fashion.num_classes, fashion.in_chans, fashion.img_size) == (10, 1, (28, 28))
    assert np.bincount(fashion.validation.labels).tolist() == [500] * 10
    assert fashion.class_names[9] == "Ankle boot"
    assert fashion.chance == pytest.approx(0.1)


def test_fashion_mnist_test_is_the_official_file(fashion):
    with gzip.open(images.DEBIAN_FASHION_MNIST / "t10k-labels-idx1-ubyte.gz") as file:
        assert bytes(fashion.test.labels.to(torch.uint8).tolist()) == file.read()[8:]
    with gzip.open(images.DEBIAN_FASHION_MNIST / "t10k-images-idx3-ubyte.gz") as file:
        assert fashion.test.pixels.numpy().tobytes() == file.read()[16:]


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_without_files_and_network_it_says_how_to_get_them(name, monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(images, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", no_network)
    with pytest.raises(
        ValueError, match=rf"'{name}' is not in .*datasets and its download failed.*connect to a network"
    ):
        load_data(name)


@pytest.mark.parametrize("debian", [True, False])
@pytest.mark.parametrize("content", [b"", struct.pack(">4I", 2051, 5, 28, 28) + bytes(20)], ids=["empty", "short"])
def test_a_file_of_fashion_mnist_that_is_cut_short(content, debian, monkeypatch, tmp_path):
    raw = tmp_path / "datasets" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (tmp_path / "debian").mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(content)
        (tmp_path / "debian" / f"{name}-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(images, "DEBIAN_FASHION_MNIST", tmp_path / ("debian" if debian else "absent"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        ValueError, match="debian' is not what the Debian" if debian else "file .* is damaged.*; remove"
    ):
        load_data("fashion-mnist")


def test_cifar_is_channels_first(monkeypatch):
    """On a stand-in for torchvision's reader, with its attributes."""

    class Reader:
        def __init__(self, root, *, train, download):
            generator = np.random.default_rng(0 if train else 1)
            self.data = generator.integers(0, 256, (200 if train else 40, 32, 32, 3), dtype=np.uint8)
            self.targets = [i % 10 for i in range(len(self.data))]
            self.classes = list("abcdefghij")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Reader)
    data = load_data("cifar10")
    assert (len(data.train), len(data.validation), len(data.test)) == (180, 20, 40)
    assert (data.in_chans, data.img_size, data.class_names) == (3, (32, 32), tuple("abcdefghij"))
    expected = torch.from_numpy(Reader("", train=False, download=True).data).permute(0, 3, 1, 2)
    assert torch.equal(data.test.pixels, expected)
    mean = data.train.pixels.double().mean((0, 2, 3))
    assert data.provenance["normalisation"]["mean"] == pytest.approx(mean.tolist())
