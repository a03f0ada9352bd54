import contextlib

import pytest
import torch

import formix
from formix.comparison.models import build_model, default_model, patch_size
from formix.data import load_data
from formix.data.glue import train_wordpiece
from formix.data.masking import masked_lm
from formix.training import forward


@pytest.mark.parametrize(
    ("size", "patch"),
    [((8, 8), 2), ((28, 28), 4), ((32, 32), 4), ((64, 64), 8), ((224, 224), 28), ((7, 7), 7), ((30, 20), 5)],
)
def test_the_patch_divides_the_image_and_leaves_few_tokens(size, patch):
    assert patch_size(size) == patch


@pytest.mark.parametrize("design", formix.list_designs())
def test_every_design_takes_the_batches_of_images(design):
    data = load_data("digits")
    batch = data.train.__getitems__([0, 1])
    assert forward(build_model(data, None, {}, design), batch).shape == (2, 10)


def test_arguments_override_the_default_and_a_named_model_replaces_it():
    data = load_data("digits")
    assert len(build_model(data, None, {"depth": 2}, "relu").blocks) == 2
    named = build_model(data, "vit_tiny_patch16_224", {"depth": 1}, "relu")
    assert named.embed_dim == default_model(data)[1]["embed_dim"]
    assert build_model(data, "deit_tiny_patch16_224", {"depth": 1, "patch_size": 4}, "relu").embed_dim == 192


def test_language_models_get_their_sizes_from_the_data(tmp_path):
    (tmp_path / "a.txt").write_text("abc def " * 400)
    data = load_data(f"text:{tmp_path}", sequence_length=16)
    model = build_model(data, None, {"n_layer": 2}, "relu+skip(heads=1)")
    assert (model.config.vocab_size, model.config.n_positions) == (256, 16)
    assert model.config.attn_pdrop == 0


def test_every_family_of_language_models_is_built_for_the_data(tmp_path):
    (tmp_path / "a.txt").write_text("abc def " * 400)
    data = load_data(f"text:{tmp_path}", sequence_length=16)
    model = build_model(data, "llama-nano", {"num_hidden_layers": 1}, "relu")
    assert forward(model, data.train.__getitems__([0])).shape == (1, 16, 256)
    assert model.config.eos_token_id is None  # no byte ends a text
    with pytest.raises(ValueError, match="bert models do not: give task='masked-lm'"):
        build_model(data, "bert-tiny", {}, "relu")
    with pytest.raises(ValueError, match="deit_tiny_patch16_224 is no model of text"):
        build_model(data, "deit_tiny_patch16_224", {}, "relu")
    with pytest.raises(ValueError, match="gpt2-nano is a model of text"):
        build_model(load_data("digits"), "gpt2-nano", {}, "relu")


@pytest.mark.parametrize("name", ["bert-tiny", "roberta-tiny"])
def test_masked_language_models_predict_every_token_of_the_longest_windows(tmp_path, name):
    (tmp_path / "a.txt").write_text("abc def " * 4000)
    data = masked_lm(load_data(f"text:{tmp_path}", sequence_length=600))
    batch = data.train.__getitems__([0])
    assert forward(build_model(data, name, {}, "paf"), batch).shape == (1, 600, 258)


def test_a_directory_keeps_its_sizes_and_gets_the_outputs_of_the_task(tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 77}
    made = formix.create_model("bert-tiny", "softmax", task="features", **sizes)
    formix.save(made.bfloat16(), tmp_path / "bert")
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA" / "train.tsv").write_text("".join(f"x\t{i % 2}\t\twords {i}\n" for i in range(20)))
    (tmp_path / "CoLA" / "dev.tsv").write_text("x\t1\t\twords\n")
    model = build_model(load_data(f"glue:{tmp_path / 'CoLA'}", sequence_length=77), str(tmp_path / "bert"), {}, "paf")
    assert (model.config.num_labels, model.config.vocab_size, model.config.max_position_embeddings) == (2, 40, 77)
    assert model.config.design == formix.design("paf").to_dict()
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # trained in full precision
    (tmp_path / "CoLA" / "train.tsv").write_text("".join(f"x\t{i % 2}\t\tword{chr(97 + i)}\n" for i in range(20)))
    with pytest.raises(ValueError, match="knows 40 tokens"):
        build_model(load_data(f"glue:{tmp_path / 'CoLA'}", sequence_length=77), str(tmp_path / "bert"), {}, "paf")


def test_a_directory_is_trained_in_the_tokens_that_it_knows(tmp_path):
    """Its weights know each word by its number; as many words of other numbers would be noise to them."""
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 400)
    words = train_wordpiece(["the cat sat on the mat."])
    words.save_pretrained(tmp_path / "words")
    train_wordpiece([".tam eht no tas tac eht"]).save_pretrained(tmp_path / "other")
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2}
    formix.save(formix.create_model("llama-nano", **sizes, num_key_value_heads=2), tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    for tokenizer, fits in (("words", True), ("model", True), ("other", False), (None, False)):
        place = tokenizer and str(tmp_path / tokenizer)
        data = load_data(f"text:{tmp_path / 'a.txt'}", sequence_length=16, tokenizer=place)
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="in the model's own, in"):
            build_model(data, str(tmp_path / "model"), {}, None)


def test_a_directory_that_cannot_read_the_data_is_refused(tmp_path):
    """Of fewer positions than the data's windows and sentences have tokens, or of the other kind."""
    (tmp_path / "a.txt").write_text("abc def " * 400)
    (tmp_path / "CoLA").mkdir()
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / "CoLA" / file).write_text("".join(f"x\t{i % 2}\t\twords {i}\n" for i in range(20)))
    text = load_data(f"text:{tmp_path / 'a.txt'}", sequence_length=16)
    sentences, images = load_data(f"glue:{tmp_path / 'CoLA'}", sequence_length=16), load_data("digits", limit=20)
    bert = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 12}
    formix.save(formix.create_model("gpt2-nano", n_positions=12), tmp_path / "gpt2")
    formix.save(formix.create_model("bert-tiny", **bert), tmp_path / "bert")
    formix.save(formix.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, depth=1), tmp_path / "vit")
    for name, data in (("gpt2", text), ("bert", sentences), ("bert", masked_lm(text))):
        with pytest.raises(ValueError, match=r"sequence_length is 16; this .* has 12 positions"):
            build_model(data, str(tmp_path / name), {}, None)
    for name, data, kind in (("gpt2", images, "text"), ("bert", images, "text"), ("vit", text, "images")):
        with pytest.raises(ValueError, match=f"{name} reads {kind}, which {data.name!r} is not"):
            build_model(data, str(tmp_path / name), {}, None)


@pytest.mark.parametrize("classes", [0, 3, 10])
def test_a_directory_of_images_for_other_classes_gets_a_new_classifier(tmp_path, classes, caplog):
    """Also one without any, as DINOv2 is published."""
    data, sizes = load_data("digits", limit=20), {"patch_size": 4, "in_chans": 1, "depth": 1}
    stored = formix.create_model("vit_tiny_patch16_224", "relu", img_size=8, num_classes=classes, **sizes)
    formix.save(stored, tmp_path / "model")
    model = build_model(data, str(tmp_path / "model"), {}, None)
    assert model.head.out_features == 10
    assert torch.equal(model.blocks[0].mlp.fc1.weight, stored.blocks[0].mlp.fc1.weight)
    assert ("the classifier is new" in caplog.text) == (classes != 10)
    if classes == 10:
        assert torch.equal(model.head.weight, stored.head.weight)
    with pytest.raises(ValueError, match=r"takes images of 1 x 8 x 8, and those of 'digits' are 1 x 16 x 16"):
        build_model(load_data("digits", limit=20, img_size=16), str(tmp_path / "model"), {}, None)


def test_a_directory_of_text_for_other_labels_gets_a_new_classifier(tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 77}
    stored = formix.create_model("bert-tiny", "softmax", num_labels=3, **sizes)
    formix.save(stored, tmp_path)
    model = formix.create_model(tmp_path, num_labels=5)
    assert model.classifier.weight.shape == (5, 32)
    assert torch.equal(model.bert.pooler.dense.weight, stored.bert.pooler.dense.weight)
    with pytest.raises(ValueError, match="weights of another shape for"):
        formix.create_model(tmp_path, vocab_size=41)
