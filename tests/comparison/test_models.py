import pytest

import formix
from formix.comparison.models import build_model, default_model, patch_size
from formix.data import load_data
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
