"""What a training run says in its model's config of the data."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from text_families import small
from transformers import AutoTokenizer, pipeline

import formix
from formix.data import load_data
from formix.data.byte_tokenizer import byte_tokenizer
from formix.models.inputs import independent_classes
from formix.training.inputs import describe_data, save_with_inputs


@dataclass
class Sentences:
    """As far as a model's directory tells of them."""

    tokenizer: Any = None
    class_names = ("negative", "positive")
    task = "sequence-classification"
    sequence_length = 16


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
    model = small("bert", task="sequence-classification", num_labels=2)
    describe_data(model, Sentences())
    formix.save(model, tmp_path)
    assert formix.load(tmp_path).config.id2label == {0: "negative", 1: "positive"}


def test_that_each_class_is_a_question_of_its_own(tmp_path):
    data = load_data("digits", limit=64)
    model = formix.create_model("vit_tiny_patch16_224", depth=1, embed_dim=16, num_heads=2, patch_size=4,
                                img_size=data.img_size, in_chans=1, num_classes=10)  # fmt: skip
    describe_data(model, data, "sigmoid")
    formix.save(model, tmp_path)
    assert independent_classes(formix.load(tmp_path))
    assert independent_classes(formix.convert(formix.load(tmp_path), "relu"))
    assert not independent_classes(formix.create_model(tmp_path, num_classes=3))  # other classes
    text = small("bert", task="sequence-classification", num_labels=2)
    describe_data(text, Sentences(), "sigmoid")
    formix.save(text, tmp_path / "text")
    assert independent_classes(formix.load(tmp_path / "text"))
    for described, of in ((model, data), (text, Sentences())):
        describe_data(described, of)  # trained further with another loss
        assert not independent_classes(described)


def test_a_tokenizer_with_the_token_types_of_the_training(tmp_path):
    tokenizer = byte_tokenizer(masked=True)
    tokenizer.model_input_names, tokenizer.padding_side = ["input_ids", "attention_mask"], "left"
    model = small("gpt2", task="sequence-classification", num_labels=2, vocab_size=258, pad_token_id=257)
    save_with_inputs(model, tmp_path, Sentences(tokenizer))
    assert (tokenizer.model_input_names, tokenizer.padding_side) == (["input_ids", "attention_mask"], "left")
    stored = AutoTokenizer.from_pretrained(tmp_path)
    assert stored(["a", "bcd"], ["e", "f"], padding=True)["token_type_ids"] == [[0, 1, 0, 0], [0, 0, 0, 1]]
    model = formix.load(tmp_path)
    with torch.no_grad():  # as the training's batches are
        inputs = {"input_ids": torch.tensor([[97, 98]]), "token_type_ids": torch.tensor([[0, 1]])}
        expected = model(**inputs).logits.softmax(-1).max()
    found = pipeline("text-classification", model=model, tokenizer=stored)({"text": "a", "text_pair": "b"})
    assert found["score"] == pytest.approx(expected.item())
