"""The datasets library, on local files in the formats it reads."""

import sys

import numpy as np
import pytest
from PIL import Image

from formix.data import load_data


def test_without_the_library_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"'hf:imdb' needs the datasets library; pip install formix\[hf\]"):
        load_data("hf:imdb")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    pytest.importorskip("datasets", reason="the datasets library is not installed; pip install formix[hf]")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def test_images_and_labels(offline, tmp_path):
    root = tmp_path / "pets"
    for split, each in (("train", 20), ("test", 5)):
        for c, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                pixels = np.full((6, 8, 3), 100 * c + i, dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:02}.png")
    data = load_data(f"hf:{root}")
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 10)
    assert (data.class_names, data.img_size) == (("cat", "dog"), (6, 8))
    assert data.test.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]
    assert data.test.labels.tolist() == [0] * 5 + [1] * 5


def test_text(offline, tmp_path):
    (tmp_path / "train.txt").write_text("some words\n" * 100)
    (tmp_path / "validation.txt").write_text("other words\n" * 100)
    data = load_data(f"hf:{tmp_path}", sequence_length=16)
    assert data.task == "causal-lm"
    assert data.provenance["bytes"] == {"train": 990, "validation": 110, "test": 1200}


def test_what_was_saved_to_disk(offline, tmp_path):
    from datasets import Dataset, DatasetDict

    words = Dataset.from_dict({"text": ["some words"] * 100})
    words.save_to_disk(tmp_path / "one")
    DatasetDict({"train": words, "test": words}).save_to_disk(tmp_path / "two")
    assert load_data(f"hf:{tmp_path / 'one'}", sequence_length=16).provenance["bytes"]["train"] == 880
    assert load_data(f"hf:{tmp_path / 'two'}", sequence_length=16).provenance["bytes"]["test"] == 1100


def test_the_record_says_which_split_became_the_test_set(offline, tmp_path):
    from datasets import Dataset, DatasetDict

    words = Dataset.from_dict({"text": ["some words"] * 100})
    DatasetDict({"train": words, "val": words}).save_to_disk(tmp_path)
    data = load_data(f"hf:{tmp_path}", sequence_length=16)
    assert "train is the data set's train, test is the data set's val;" in data.provenance["preprocessing"]


def test_an_empty_cell_is_no_image(offline, tmp_path):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    features = Features({"image": ImageColumn(), "label": ClassLabel(names=["cat", "dog"])})
    pictures = [Image.fromarray(np.full((6, 8, 3), i, dtype=np.uint8)) for i in range(7)]
    Dataset.from_dict({"image": [*pictures, None], "label": [0, 1] * 4}, features).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"train 7' cannot be read \(its cell is empty\)"):
        load_data(f"hf:{tmp_path}")


def test_empty_cells_are_empty_lines(offline, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "word"}\n{"text": null}\n' * 100)
    data = load_data(f"hf:{tmp_path}", sequence_length=16)
    assert sum(data.provenance["bytes"].values()) == 600


@pytest.mark.parametrize("missing", [None, -1])
def test_images_without_labels_are_not_trained_on(offline, tmp_path, missing):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    features = Features({"image": ImageColumn(), "label": ClassLabel(names=["cat", "dog"])})
    pictures = [Image.fromarray(np.full((6, 8, 3), i, dtype=np.uint8)) for i in range(4)]
    Dataset.from_dict({"image": pictures, "label": [0, 1, missing, 0]}, features).save_to_disk(tmp_path / "pets")
    with pytest.raises(ValueError, match="rows for training whose label is missing"):
        load_data(f"hf:{tmp_path / 'pets'}")


def test_other_columns_and_names_say_what_was_found(offline, tmp_path):
    (tmp_path / "train.csv").write_text("height,weight\n" + "1,2\n" * 5)
    with pytest.raises(ValueError, match=r"has the columns height \(Value\), weight \(Value\); needed are an Image"):
        load_data(f"hf:{tmp_path}")
    with pytest.raises(ValueError, match="could not be loaded by the datasets library"):
        load_data("hf:formix-tests/absent")
