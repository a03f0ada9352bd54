"""Folders and tars of images."""

import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from formix.data import folder, load_data
from formix.data.encoded import DecodedWhenRead

CLASSES = ["bird", "cat", "dog"]


def draw(path, seed: int, size=(20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def tree(root, *splits: str, each: int = 10, size=(20, 12)):
    """`each` images of every class in every split; "" is a tree of classes without splits."""
    for s, split in enumerate(splits):
        for c, name in enumerate(CLASSES):
            for i in range(each):
                draw(root / split / name / f"{i:02}.png", 1000 * s + 100 * c + i, size)
    return root


def pack(root, path, mode="w"):
    with tarfile.open(path, mode) as archive:
        archive.add(root, arcname=root.name)
    return path


def everything(dataset):
    return dataset.__getitems__(range(len(dataset)))


def test_train_and_val(tmp_path):
    data = load_data(f"folder:{tree(tmp_path, 'train', 'val')}", img_size=8)
    assert (len(data.train), len(data.validation), len(data.test)) == (27, 3, 30)
    assert data.class_names == ("bird", "cat", "dog")
    assert (data.in_chans, data.img_size) == (3, (8, 8))
    assert data.test.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert sorted(data.validation.labels.tolist()) == [0, 1, 2]


def test_train_val_and_test_are_what_they_say(tmp_path):
    tree(tmp_path, "train", "val", "test")
    draw(tmp_path / "val" / "cat" / "more.png", 5)
    data = load_data(f"folder:{tmp_path}")
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 31, 30)


@pytest.mark.parametrize("kind", ["folder", "stream"])
@pytest.mark.parametrize(
    ("train", "held", "spelled"),
    [("Train", "Val", "Test"), ("training", "validation", "testing"), ("train", "valid", "test")],
)
def test_splits_are_known_by_their_usual_names(tmp_path, monkeypatch, kind, train, held, spelled):
    monkeypatch.setenv("FORMIX_CACHE", str(tmp_path / "cache"))
    tree(tmp_path / "three", train, held, spelled)
    data = load_data(f"{kind}:{tmp_path / 'three'}")
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 30, 30)
    assert data.class_names == ("bird", "cat", "dog")
    tree(tmp_path / "two", train, held, each=20)
    data = load_data(f"{kind}:{tmp_path / 'two'}", validation_fraction=0.3)
    assert (len(data.train) + len(data.validation), len(data.test)) == (60, 60)
    (tmp_path / "two" / held.upper()).mkdir()
    draw(tmp_path / "two" / held.upper() / "cat" / "0.png", 1)
    with pytest.raises(ValueError, match=f"has the folders {held.upper()} and {held} for validation; keep one"):
        load_data(f"{kind}:{tmp_path / 'two'}")


def test_hidden_folders_are_no_classes(tmp_path):
    draw(tree(tmp_path, "") / ".thumbnails" / "0.png", 1)
    draw(tmp_path / "cat" / ".thumbnails" / "0.png", 1)
    data = load_data(f"folder:{tmp_path}")
    assert data.class_names == ("bird", "cat", "dog")
    assert sum(data.provenance["counts"].values()) == 30


@pytest.mark.parametrize(
    ("splits", "stray", "what"),
    [(("",), "0.png", "in no class"), (("train", "val"), "more/cat/0.png", "in no class of a split")],
)
def test_images_outside_of_the_classes_are_said_to_be_passed_over(tmp_path, caplog, splits, stray, what):
    draw(tree(tmp_path, *splits) / stray, 1)
    load_data(f"folder:{tmp_path}")
    assert f"passed over in {tmp_path}: 1 images {what}, such as {stray}" in caplog.text


LEVELS = np.arange(0, 2**16, 257, dtype=np.uint16).reshape(16, 16)  # 16 bits; those of 8 are 0 to 255


@pytest.mark.parametrize(
    ("suffix", "levels"), [("png", LEVELS), ("tif", LEVELS), ("tif", LEVELS.astype(">u2")), ("pgm", LEVELS)]
)
@pytest.mark.parametrize("kind", ["folder", "decoded when read", "stream"])
def test_grey_of_16_bits_is_that_of_8(tmp_path, monkeypatch, kind, suffix, levels):
    monkeypatch.setenv("FORMIX_CACHE", str(tmp_path / "cache"))
    if kind == "decoded when read":
        monkeypatch.setattr(folder, "MEMORY_LIMIT", 1000)
    for split in ("train", "val", "test"):
        for label in "ab":
            (tmp_path / "grey" / split / label).mkdir(parents=True)
            Image.fromarray(levels).save(tmp_path / "grey" / split / label / f"0.{suffix}")
    data = load_data(f"{'stream' if kind == 'stream' else 'folder'}:{tmp_path / 'grey'}")
    for split in (data.train, data.validation, data.test):
        assert split.pixels[[0, 1]].tolist() == [[(LEVELS >> 8).tolist()] * 3] * 2


@pytest.mark.parametrize("split", ["", "train"])
def test_without_val_both_are_held_out(tmp_path, split):
    data = load_data(f"folder:{tree(tmp_path, split, each=20)}", validation_fraction=0.1, test_fraction=0.2)
    assert (len(data.train), len(data.validation), len(data.test)) == (42, 6, 12)
    assert np.bincount(data.test.labels).tolist() == [4, 4, 4]
    images = [tuple(p.flatten().tolist()) for s in (data.train, data.validation, data.test) for p in s.pixels]
    assert len(set(images)) == 60


def test_images_that_agree_keep_their_size_and_their_pixels(tmp_path):
    data = load_data(f"folder:{tree(tmp_path, 'train', 'val')}")
    assert data.img_size == (12, 20)
    expected = np.asarray(Image.open(tmp_path / "val" / "bird" / "00.png"))
    assert np.array_equal(data.test.pixels[0].permute(1, 2, 0), expected)


def test_images_that_differ_are_scaled_to_64_and_cut_to_the_centre(tmp_path):
    tree(tmp_path, "train", "val")
    stripes = np.zeros((128, 256, 3), dtype=np.uint8)
    stripes[:, 64:192] = 255  # the centre square
    Image.fromarray(stripes).save(tmp_path / "val" / "bird" / "00.png")
    data = load_data(f"folder:{tmp_path}")
    assert data.img_size == (64, 64)
    assert (data.test.pixels[0][:, :, 2:-2] == 255).all()


def test_grey_and_transparent_images_become_rgb(tmp_path):
    tree(tmp_path, "train", "val")
    Image.new("L", (20, 12), 7).save(tmp_path / "val" / "bird" / "00.png")
    Image.new("RGBA", (20, 12), (1, 2, 3, 4)).save(tmp_path / "val" / "bird" / "01.png")
    pixels = load_data(f"folder:{tmp_path}").test.pixels
    assert pixels[0].unique().tolist() == [7]
    assert pixels[1][:, 0, 0].tolist() == [1, 2, 3]


def test_a_tar_equals_its_folder(tmp_path):
    root = tree(tmp_path / "pets", "train", "val")
    one, other = load_data(f"folder:{root}"), load_data(f"folder:{pack(root, tmp_path / 'pets.tar')}")
    assert one.provenance["sha256"] == other.provenance["sha256"]
    for split in ("train", "validation", "test"):
        a, b = everything(getattr(one, split)), everything(getattr(other, split))
        assert torch.equal(a["pixel_values"], b["pixel_values"])
        assert torch.equal(a["labels"], b["labels"])


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_more_than_fits_is_decoded_when_read(tmp_path, monkeypatch, kind):
    root = tree(tmp_path / "pets", "train", "val")
    name = f"folder:{root if kind == 'folder' else pack(root, tmp_path / 'pets.tar')}"
    kept = load_data(name)
    monkeypatch.setattr(folder, "MEMORY_LIMIT", 1000)
    read = load_data(name)
    assert isinstance(read.train.pixels, DecodedWhenRead)
    assert read.provenance["normalisation"] == kept.provenance["normalisation"]
    a, b = everything(read.test), everything(kept.test)
    assert torch.equal(a["pixel_values"], b["pixel_values"])
    loader = torch.utils.data.DataLoader(read.test, batch_size=7, num_workers=2, collate_fn=lambda batch: batch)
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), b["pixel_values"])
    assert load_data(name).provenance["sha256"] == read.provenance["sha256"]
    if kind == "folder":  # another picture is other data, though its pixels are not read for the hash
        (root / "train" / "cat" / "03.png").rename(root / "train" / "cat" / "030.png")
        assert load_data(name).provenance["sha256"] != read.provenance["sha256"]


def test_links_in_a_tar_are_the_images_they_lead_to(tmp_path, caplog):
    root = tree(tmp_path / "pets", "")
    os.link(root / "cat" / "00.png", root / "cat" / "hard.png")
    (root / "dog" / "soft.png").symlink_to("../cat/01.png")
    whole = load_data(f"folder:{root}")
    packed = load_data(f"folder:{pack(root, tmp_path / 'pets.tar')}")
    assert sum(packed.provenance["counts"].values()) == 32
    assert packed.provenance["sha256"] == whole.provenance["sha256"]
    (root / "dog" / "lost.png").symlink_to("nowhere.png")
    load_data(f"folder:{pack(root, tmp_path / 'pets.tar')}")
    assert "1 links to what it does not hold, such as pets/dog/lost.png" in caplog.text


def test_tiny_imagenet(shared):
    data = load_data(f"folder:{shared / 'tiny_imagenet20.tar'}", limit=300)
    assert (len(data.train), len(data.validation), len(data.test)) == (300, 1000, 1000)
    assert (data.num_classes, data.img_size, data.chance) == (20, (64, 64), pytest.approx(0.05))


def test_photographs(shared):
    data = load_data(f"folder:{shared / 'hymenoptera.tar'}", img_size=32)
    assert (len(data.train), len(data.validation), len(data.test)) == (219, 24, 153)
    assert data.class_names == ("ants", "bees")


def broken(root):
    (root / "train" / "dog" / "03.png").write_bytes(b"not an image")


def cut_short(root):
    path = root / "val" / "cat" / "05.png"
    path.write_bytes(path.read_bytes()[:200])


def stranger(root):
    draw(root / "val" / "fish" / "0.png", 1)


def only_val(root):
    (root / "train").rename(root / "test")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (broken, r"image '.*dog/03.png' cannot be read \(it is no image\); repair or remove it"),
        (cut_short, r"image '.*cat/05.png' cannot be read \(.*\); repair or remove it"),
        (stranger, "test split of .* has the class 'fish', which train lacks; that has bird, cat, dog"),
        (only_val, "has test and val but no train to learn from"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_damaged_trees_say_what_is_wrong(tmp_path, damage, sentence, kind):
    root = tree(tmp_path / "pets", "train", "val")
    damage(root)
    with pytest.raises(ValueError, match=sentence):
        load_data(f"folder:{root if kind == 'folder' else pack(root, tmp_path / 'pets.tar')}")


def test_paths_without_a_tree_of_images_say_what_is_needed(tmp_path):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    draw(tmp_path / "loose" / "a.png", 1)
    for i in range(5):
        draw(tmp_path / "single" / "cat" / f"{i}.png", i)
        draw(tmp_path / "rare" / "cat" / f"{i}.png", i)
    draw(tmp_path / "rare" / "dog" / "0.png", 9)
    (tmp_path / "notes.txt").write_text("text")
    for path, sentence in {
        "absent": "absent' does not exist; give a folder, or a .tar",
        "empty": "empty' holds no images",
        "loose": "has images but no classes; put the images of each class in a folder",
        "single": "has one class only, 'cat'",
        "rare": r"has the class 'dog' with too few samples to divide \(1 left\)",
        "notes.txt": "is neither a folder nor an uncompressed .tar",
        str(pack(tree(tmp_path / "pets", "train"), tmp_path / "pets.tar.gz", "w:gz")): "nor an uncompressed .tar",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            load_data(f"folder:{tmp_path / path}")


@pytest.mark.parametrize("below", ["", "any"], ids=["no class", "one class"])
def test_what_reads_no_labels_needs_no_classes(below, tmp_path):
    for i in range(20):
        draw(tmp_path / "flat" / below / f"{i:02}.png", i)
    (tmp_path / "flat" / "any").mkdir(exist_ok=True)
    for place in (tmp_path / "flat", pack(tmp_path / "flat", tmp_path / "flat.tar")):
        data = load_data(f"folder:{place}", labelled=False)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [16, 2, 2]
        images = torch.cat([everything(part)["pixel_values"] for part in (data.train, data.validation, data.test)])
        assert len(images.unique(dim=0)) == 20  # in one split each
        with pytest.raises(ValueError, match=r"no classes|one class only"):
            load_data(f"folder:{place}")
        assert data.provenance["preprocessing"].startswith(
            "a folder per class" if below or place.suffix else "images in"
        )
    classes = tree(tmp_path / "pets", "train", "val")
    with_labels, without = (load_data(f"folder:{classes}", labelled=labelled) for labelled in (True, False))
    assert with_labels.provenance == without.provenance


def test_pictures_of_other_formats_are_said_to_be_passed_over(tmp_path, caplog):
    draw(tree(tmp_path, "") / "cat" / "more.gif", 1)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    data = load_data(f"folder:{tmp_path}")
    assert sum(data.provenance["counts"].values()) == 30
    assert f"passed over in {tmp_path}: 1 of other formats, such as cat/more.gif" in caplog.text
