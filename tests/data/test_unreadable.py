"""Images that cannot be read: refused with their name, or left out and counted."""

import os

import numpy as np
import pytest
import torch
from data.test_folder import draw, pack, tree
from PIL import Image

from formix.data import folder, load_data

SPLITS = ("train", "validation", "test")
BAD = ("train/bird/03.png", "train/dog/00.png", "val/cat/05.png")  # the last is of the test split


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORMIX_CACHE", str(tmp_path / "cache"))


def cut_short(path):
    image = path.with_suffix(".jpg")
    draw(image, 1)
    path.unlink()
    image.write_bytes(image.read_bytes()[:-200])  # the header is whole


def floating(path):
    levels = Image.fromarray(np.linspace(0, 1, 240, dtype=np.float32).reshape(12, 20))
    levels.save(path.with_suffix(".tif"))
    path.unlink()


def cut_short_of_16_bits(path):
    Image.fromarray(np.arange(240, dtype=np.uint16).reshape(12, 20)).save(path)
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.rename(path.with_suffix(".jpg")).write_text("not an image")


@pytest.fixture(params=["folder", "tar", "decoded when read", "stream"])
def opened(request, tmp_path, monkeypatch):
    """Opens a tree of pictures as one of the kinds of data."""
    if request.param == "decoded when read":
        monkeypatch.setattr(folder, "MEMORY_LIMIT", 1000)

    def load(root, **options):
        name = f"stream:{root}" if request.param == "stream" else f"folder:{root}"
        return load_data(
            f"folder:{pack(root, root.with_suffix('.tar'))}" if request.param == "tar" else name, **options
        )

    return load


def pets(root, *damage):
    tree(root, "train", "val", each=20)
    for spoil, path in zip(damage, BAD, strict=False):
        spoil(root / path)
    return root


def everything(data):
    return [getattr(data, split).__getitems__(range(len(getattr(data, split)))) for split in SPLITS]


def test_they_are_refused_by_name_unless_skipping_is_asked_for(opened, tmp_path):
    for number, spoil in enumerate((cut_short, empty, text, floating, cut_short_of_16_bits)):
        root = pets(tmp_path / str(number), spoil)
        with pytest.raises(
            ValueError, match=r"image '.*bird/03\.(png|jpg|tif)' cannot be read \(.*\); repair or remove it, or"
        ):
            everything(opened(root))


def test_skipping_leaves_them_out_and_counts_and_names_them(opened, tmp_path, caplog):
    data = opened(pets(tmp_path / "pets", cut_short, empty, text), on_bad_sample="skip")
    assert data.provenance["skipped"] == {"train": 2, "test": 1}
    assert len(data.test) == 59
    assert len(data.train) + len(data.validation) == 58
    assert data.provenance["counts"] == {split: len(getattr(data, split)) for split in SPLITS}
    assert [len(batch["labels"]) for batch in everything(data)] == [len(getattr(data, split)) for split in SPLITS]
    assert "1 of test" in caplog.text
    for name in ("bird/03.jpg", "dog/00.png", "cat/05.jpg"):
        assert name in caplog.text


def test_levels_without_a_range_are_left_out_too(opened, tmp_path):
    data = opened(pets(tmp_path / "pets", floating, cut_short_of_16_bits), on_bad_sample="skip")
    assert data.provenance["skipped"] == {"train": 2, "test": 0}


@pytest.mark.parametrize("empty_folder", ["train/fish", "val/fish", "train/cat", "fish"])
def test_a_class_without_images_is_refused_by_name(opened, tmp_path, empty_folder):
    root = tree(tmp_path / "pets", *(["train", "val"] if "/" in empty_folder else [""]), each=5)
    (root / empty_folder).mkdir(exist_ok=True)
    for path in (root / empty_folder).iterdir():
        path.unlink()
    (root / empty_folder / "notes.txt").write_text("none yet")
    (root / empty_folder).parent.joinpath(".hidden").mkdir()
    with pytest.raises(ValueError, match=f"The class '{empty_folder}' of '.*' has no images; add some, or remove"):
        opened(root)


def test_without_any_the_data_are_the_same(opened, tmp_path):
    one, other = (opened(pets(tmp_path / "pets"), on_bad_sample=choice) for choice in ("refuse", "skip"))
    assert other.provenance["skipped"] == {"train": 0, "test": 0}
    assert one.provenance["sha256"] == other.provenance["sha256"]
    for ours, theirs in zip(everything(one), everything(other), strict=True):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_named_splits_are_those_of_a_tree_without_the_files(opened, tmp_path):
    root, clean = (tree(tmp_path / name, "train", "val", "test", each=12) for name in ("pets", "clean"))
    for spoil, path in ((cut_short, "train/bird/03.png"), (empty, "val/cat/05.png")):
        spoil(root / path)
        (clean / path).unlink()
    for ours, theirs in zip(everything(opened(root, on_bad_sample="skip")), everything(opened(clean)), strict=True):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        assert torch.equal(ours["labels"], theirs["labels"])


def test_too_many_are_refused(opened, tmp_path):
    root = tree(tmp_path / "half", "train", "val", each=20)
    for path in sorted((root / "val").rglob("*.png"))[::2]:
        empty(path)
    with pytest.raises(
        ValueError, match=r"Of the 60 images for test in '.*', 30 cannot be read, such as '.*'; at most 10%"
    ):
        opened(root, on_bad_sample="skip")
    root = tree(tmp_path / "all", "train", "val", each=20)
    for path in (root / "val").rglob("*.png"):
        text(path)
    with pytest.raises(ValueError, match=r"Of the 60 images for test in '.*', 60 cannot be read"):
        opened(root, on_bad_sample="skip")
    root = tree(tmp_path / "class", "train", "val", "test", each=20)
    draw(root / "train" / "fish" / "0.png", 1)
    empty(root / "train" / "fish" / "0.png")
    with pytest.raises(ValueError, match=r"No image for training of the class 'fish' in '.*' can be read"):
        opened(root, on_bad_sample="skip")


def test_a_stream_reads_all_images_once_and_notices_a_repair(tmp_path, monkeypatch):
    root = pets(tmp_path / "pets", empty)
    broken = root / BAD[0]
    first = load_data(f"stream:{root}", on_bad_sample="skip")
    with monkeypatch.context() as patch:
        patch.setattr("formix.data.stream._write", None)
        again = load_data(f"stream:{root}", on_bad_sample="skip")
    assert again.provenance == first.provenance
    changed = broken.parent.stat().st_mtime_ns
    draw(broken, 3)
    os.utime(broken.parent, ns=(changed, changed))
    repaired = load_data(f"stream:{root}", on_bad_sample="skip")
    assert sum(repaired.provenance["skipped"].values()) == 0
    assert sum(map(len, (repaired.train, repaired.validation))) == 60


def test_other_data_and_words_are_refused(tmp_path):
    with pytest.raises(ValueError, match="on_bad_sample='skip' is for images in files"):
        load_data("digits", on_bad_sample="skip")
    with pytest.raises(ValueError, match="on_bad_sample='ignore' must be 'refuse' or 'skip'"):
        load_data("digits", on_bad_sample="ignore")


def test_what_is_held_out_may_be_few(tmp_path):
    root = pets(tmp_path / "pets", empty)
    data = load_data(f"folder:{root}", on_bad_sample="skip", limit=2, validation_fraction=0.05)
    assert (len(data.train), len(data.validation)) == (2, 3)
