"""Linear probe of frozen features."""

import copy
import dataclasses

import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_digits

import formix
from formix.data import load_data
from formix.evaluation import image_features, linear_probe, probe
from formix.evaluation.suitable import normalised_for


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", img_size=16)


def small_vit(**more):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0, **more
    )


def test_features_are_what_the_classifier_reads(digits):
    model = small_vit(in_chans=1)
    features = image_features(model, digits.test, precision="float32")
    assert features.shape == (len(digits.test), 32)
    expected = model.eval()(digits.test.__getitems__(range(8))["pixel_values"])  # num_classes=0: pooled features
    torch.testing.assert_close(features[:8], expected)


def test_images_are_read_in_the_type_of_the_weights(digits):
    model = small_vit(in_chans=1).double()
    features = image_features(model, digits.test, precision="float32")
    expected = image_features(model.bfloat16(), digits.test, precision="float32")
    torch.testing.assert_close(features, expected, rtol=0.1, atol=0.1)


def test_training_mode_is_restored(digits):
    model = small_vit(in_chans=1).train()
    image_features(model, digits.validation)
    assert model.training


class Brightness(torch.nn.Module):
    """Features that say which quarters of the picture are bright: what a probe can and cannot read is known."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept, self.unused = kept, torch.nn.Parameter(torch.zeros(1))

    def forward_features(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)

    def forward_head(self, x, pre_logits=False):
        assert pre_logits
        return x[:, : self.kept]


def test_probe_reads_what_is_there(digits):
    assert linear_probe(Brightness(64), digits, precision="float32") > 0.95  # digits are almost linearly separable
    assert linear_probe(Brightness(8), digits, precision="float32") < 0.5  # the top row alone is not enough


def test_probe_is_fitted_on_no_more_than_the_limit(digits):
    few, all_of_them = (linear_probe(Brightness(64), digits, limit=n, precision="float32") for n in (30, 10_000))
    assert 0.3 < few < all_of_them - 0.05


def test_the_test_split_chooses_no_penalty(digits, monkeypatch):
    """On a single validation sample all penalties are as good; which of them test would prefer is not looked at."""
    one = copy.copy(digits.validation)
    one.pixels, one.labels = digits.train.pixels[:1], digits.train.labels[:1]
    data = dataclasses.replace(digits, validation=one)

    def accuracy(*tried):
        monkeypatch.setattr(probe, "PENALTIES", tried)
        return linear_probe(Brightness(64), data, limit=200, precision="float32")

    assert accuracy(0.01, 1.0) == accuracy(0.01) < accuracy(1.0)


def test_probe_agrees_with_scikit_learn(digits):
    """The features of `Brightness` are the 8 x 8 pixels, so scikit-learn's own regression must do as well."""
    from sklearn.linear_model import LogisticRegression

    images = load_digits().images.reshape(-1, 64)
    labels = load_digits().target
    rows = np.random.default_rng(0).permutation(len(labels))
    straight = LogisticRegression(max_iter=5000).fit(images[rows[:1400]], labels[rows[:1400]])
    expected = straight.score(images[rows[1400:]], labels[rows[1400:]])
    assert linear_probe(Brightness(64), digits, precision="float32") == pytest.approx(expected, abs=0.03)


def test_grey_images_get_the_model_s_channels_and_statistics(digits):
    model = formix.create_model(
        "vit_tiny_patch16_224", design="relu", img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2
    )
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    images = digits.test.normalised(mean, std).__getitems__([0, 1])["pixel_values"]
    pixels = digits.test.pixels[[0, 1]].float() / 255
    for channel in range(3):
        torch.testing.assert_close(images[:, channel], (pixels[:, 0] - mean[channel]) / std[channel])
    assert 0.1 < linear_probe(model, digits) <= 1


def test_the_provenance_has_the_statistics_that_images_are_read_with(digits):
    data = normalised_for(small_vit(), digits)
    recorded = data.provenance["normalisation"]
    assert recorded["of"] == "pixels 0 to 255, the model's own"
    mean, std = (torch.tensor(recorded[key]) for key in ("mean", "std"))
    pixels = digits.test.pixels[0].float().expand(3, -1, -1)
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(data.test.__getitems__([0])["pixel_values"][0], expected)
    assert digits.provenance["normalisation"]["of"] == "pixels 0 to 255, training split"


def test_grey_images_are_read_by_a_stock_model_of_one_channel(digits):
    model = timm.create_model(
        "vit_tiny_patch16_224", in_chans=1, img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2
    )
    assert 0.1 < linear_probe(model, digits) <= 1


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(ValueError, match=r"The model takes images of 3 x 16 x 16, and those of 'digits' are 3 x 8 x 8"):
        linear_probe(small_vit(), load_data("digits"))
    with pytest.raises(ValueError, match="needs labelled images"):
        linear_probe(Brightness(1), load_data("stdlib", limit=20000))
    two_channels = load_data("digits").train.normalised([0.5, 0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="2 channels and the statistics 3"):
        two_channels.normalised([0.5] * 3, [0.5] * 3)
