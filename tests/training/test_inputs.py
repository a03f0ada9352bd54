"""What a training run says in its model's config of the data."""

import pytest
from text_families import small

import formix
from formix.data import load_data
from formix.training.inputs import describe_data


def test_images_by_statistics_and_names(tmp_path):
    data = load_data("digits", limit=64)
    model = formix.create_model(
        "vit_tiny_patch16_224", design="relu", depth=1, embed_dim=16, num_heads=2, patch_size=4,
        img_size=data.img_size, in_chans=1, num_classes=10,
    )  # fmt: skip
    describe_data(model, data)
    formix.save(model, tmp_path)
    stored = formix.load(tmp_path).pretrained_cfg
    statistics = data.provenance["normalisation"]
    assert stored["mean"] == pytest.approx([x / 255 for x in statistics["mean"]])
    assert stored["std"] == pytest.approx([x / 255 for x in statistics["std"]])
    assert stored["label_names"] == list(data.class_names)
    assert (stored["crop_pct"], stored["interpolation"]) == (1.0, "bilinear")


def test_text_by_the_names_of_its_classes(tmp_path):
    class Sentences:
        class_names = ("negative", "positive")
        task = "sequence-classification"

    model = small("bert", task="sequence-classification", num_labels=2)
    describe_data(model, Sentences())
    formix.save(model, tmp_path)
    assert formix.load(tmp_path).config.id2label == {0: "negative", 1: "positive"}
