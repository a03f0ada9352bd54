import os

import numpy as np
import pytest
import torch
from PIL import Image

from formix.data import load_data

LABELS = ("ants", "bees", "cats")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


def tree(root, splits, count=20, size=(8, 8)):
    generator = np.random.default_rng(0)
    for split in splits:
        for label in LABELS:
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return root


def test_named_splits_are_those_of_a_folder_in_memory(tmp_path):
    root = tree(tmp_path / "pictures", ("train", "val", "test"))
    streamed, whole = load_data(f"stream:{root}"), load_data(f"folder:{root}")
    assert streamed.class_names == whole.class_names
    assert streamed.img_size == (8, 8)
    for split in ("train", "validation", "test"):
        ours, theirs = getattr(streamed, split), getattr(whole, split)
        assert torch.equal(ours.labels, theirs.labels)
        batch, other = ours.__getitems__([0, 25, 59]), theirs.__getitems__([0, 25, 59])
        torch.testing.assert_close(batch["pixel_values"], other["pixel_values"])


def test_what_is_missing_is_held_out_without_overlap_or_loss(tmp_path):
    data = load_data(f"stream:{tree(tmp_path / 'pictures', ('',), count=100)}", test_fraction=0.2)
    names = {
        split: {getattr(data, split).pixels.file(i).name for i in range(len(getattr(data, split)))}
        for split in ("train", "validation", "test")
    }
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 300
    assert len(names["validation"]) == pytest.approx(30, abs=12)
    assert len(names["test"]) == pytest.approx(60, abs=15)
    for split, dataset in (("train", data.train), ("test", data.test)):
        assert all(LABELS[label] in dataset.pixels.file(i).name for i, label in enumerate(dataset.labels.tolist())), (
            split
        )


def test_a_folder_is_listed_once_until_it_changes(tmp_path, cache, monkeypatch):
    root = tree(tmp_path / "pictures", ("train", "test"))
    first = load_data(f"stream:{root}")
    monkeypatch.setattr("formix.data.stream._write", None)
    assert load_data(f"stream:{root}").provenance == first.provenance
    assert len(list(cache.iterdir())) == 1
    monkeypatch.undo()
    monkeypatch.setenv("FORMIX_CACHE", str(cache.parent))
    (root / "train" / "ants" / "000.png").rename(root / "train" / "ants" / "999.png")
    os.utime(root / "train" / "ants", ns=(1, 1))
    changed = load_data(f"stream:{root}")
    assert changed.provenance["sha256"] != first.provenance["sha256"]
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: bytes([b[0] ^ 1]) + b[1:], None])
def test_a_damaged_index_is_made_anew(tmp_path, cache, damage):
    root = tree(tmp_path / "pictures", ("train", "test"), count=4)
    first = load_data(f"stream:{root}")
    (index,) = cache.iterdir()
    for path in sorted(index.iterdir()):
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(path.read_bytes()))
        again = load_data(f"stream:{root}")
        assert again.provenance == first.provenance
        assert torch.equal(again.test.labels, first.test.labels)


def test_images_are_on_disk_and_not_in_memory(tmp_path):
    root = tree(tmp_path / "pictures", ("train", "test"), size=(9, 7))
    data = load_data(f"stream:{root}", img_size=6, limit=10)
    assert len(data.train) == 10
    assert isinstance(data.train.pixels.index["names"], np.memmap)
    image = data.train.pixels.file(3)
    os.truncate(image.name, 5)
    with pytest.raises(ValueError, match="cannot be read"):
        data.train.__getitems__([3])


def test_sizes_that_differ_give_the_default_square(tmp_path):
    root = tree(tmp_path / "pictures", ("train", "test"), count=2)
    Image.new("RGB", (30, 20)).save(root / "train" / "ants" / "wide.png")
    assert load_data(f"stream:{root}", validation_fraction=0.5).img_size == (64, 64)


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        load_data(f"stream:{tmp_path / 'none'}")
    (tmp_path / "one" / "train" / "ants").mkdir(parents=True)
    with pytest.raises(ValueError, match="at least two classes"):
        load_data(f"stream:{tmp_path / 'one'}")
    (tmp_path / "one" / "train" / "bees").mkdir()
    with pytest.raises(ValueError, match=r"class 'train/ants' of .* has no images"):
        load_data(f"stream:{tmp_path / 'one'}")
    (tmp_path / "half" / "val" / "ants").mkdir(parents=True)
    with pytest.raises(ValueError, match="no train to learn from"):
        load_data(f"stream:{tmp_path / 'half'}")
    root = tree(tmp_path / "more", ("train", "test"), count=2)
    (root / "test" / "dogs").mkdir()
    Image.new("RGB", (8, 8)).save(root / "test" / "dogs" / "0.png")
    with pytest.raises(ValueError, match="the class 'dogs', which train lacks"):
        load_data(f"stream:{root}")


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    root = tree(tmp_path / "pictures", ("train", "test"), count=2)
    monkeypatch.setenv("FORMIX_CACHE", str(root / "train" / "ants" / "000.png" / "cache"))
    with pytest.raises(ValueError, match="another directory in the environment variable FORMIX_CACHE"):
        load_data(f"stream:{root}")
