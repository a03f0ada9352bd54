import random

import pytest
import torch
from PIL import Image

from formix.data import folder, load_data
from formix.data.augmentation import Augmentation, augmented

DEIT = Augmentation(crop=0.3, flip=0.5, policy="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0, repeats=3)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", limit=64)


def batch_of(data, indices):
    return data.train.__getitems__(indices)


def test_nothing_is_varied_by_default(digits):
    assert augmented(digits, Augmentation(), 0) is digits


def test_without_variation_the_pixels_are_those_of_the_data(digits):
    plain = augmented(digits, Augmentation(repeats=2), 0)
    torch.testing.assert_close(batch_of(plain, [3, 5])["pixel_values"], batch_of(digits, [3, 5])["pixel_values"])


def test_a_draw_depends_on_seed_sample_and_draw_alone(digits):
    policy = Augmentation(policy="rand-m9-mstd0.5-inc1", erasing=0.5, crop=0.5)
    data, size = augmented(digits, policy, 0), len(digits.train)
    random.seed(7)
    together = batch_of(data, [4, 9, 4 + size])["pixel_values"]
    random.seed(8)
    alone = [batch_of(data, [index])["pixel_values"][0] for index in (4, 9, 4 + size)]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together[0], together[2])
    assert not torch.equal(together[0], batch_of(augmented(digits, policy, 1), [4])["pixel_values"][0])


def test_the_whole_recipe_is_repeatable_and_gives_distributions(digits):
    data = augmented(digits, DEIT, 0)
    first, second = (batch_of(data, range(16)) for _ in range(2))
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.equal(first["labels"], second["labels"])
    assert first["labels"].shape == (16, 10)
    torch.testing.assert_close(first["labels"].sum(1), torch.ones(16))
    assert (first["labels"].max(1).values < 1).any()
    assert data.validation is digits.validation
    assert data.provenance["augmentation"]["mixup"] == 0.8


def test_mixing_an_odd_batch_leaves_the_middle_and_a_single_image(digits):
    data = augmented(digits, Augmentation(mixup=1.0), 0)
    batch, plain = batch_of(data, [0, 1, 2, 3, 4]), batch_of(digits, [0, 1, 2, 3, 4])
    torch.testing.assert_close(batch["pixel_values"][2], plain["pixel_values"][2])
    share = batch["labels"][0, plain["labels"][0]]
    mixed = share * plain["pixel_values"][0] + (1 - share) * plain["pixel_values"][4]
    torch.testing.assert_close(batch["pixel_values"][0], mixed)
    assert batch_of(data, [7])["labels"].shape == (1, 10)


def test_a_shift_moves_the_image_and_fills_with_zeros(digits):
    data = augmented(digits, Augmentation(shift=2), 0)
    black = digits.train.shift.item()  # what a pixel of 0 is normalised to
    plain = torch.nn.functional.pad(batch_of(digits, [0])["pixel_values"][0], (2, 2, 2, 2), value=black)
    windows = plain.unfold(1, 8, 1).unfold(2, 8, 1).reshape(-1, 8, 8)
    for draw in range(5):
        moved = batch_of(data, [draw * len(digits.train)])["pixel_values"][0, 0]
        assert any(torch.allclose(moved, window, atol=1e-5) for window in windows)


@pytest.mark.parametrize(("source", "limit"), [("folder", 2**30), ("folder", 0), ("stream", 0)])
def test_crops_are_of_the_whole_picture(tmp_path, monkeypatch, source, limit):
    """Black pictures with white ends, which the centre cut of the other uses leaves out."""
    monkeypatch.setenv("FORMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "MEMORY_LIMIT", limit)
    pixels = torch.zeros(16, 64, 3, dtype=torch.uint8)
    pixels[:, :20] = pixels[:, -20:] = 255
    for place in [f"{split}/{label}/{i}" for split in ("train", "val") for label in "ab" for i in range(9)]:
        path = tmp_path / "data" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    data = load_data(f"{source}:{tmp_path / 'data'}", img_size=8)
    black = data.train.shift.amin()
    assert (batch_of(data, range(9))["pixel_values"] <= black + 1e-3).all()
    varied = augmented(data, Augmentation(crop=0.2), 0)
    drawn = batch_of(varied, range(9))["pixel_values"]
    assert drawn.shape == (9, 3, 8, 8)
    assert (drawn > black + 1).any()
    assert torch.equal(drawn[3], batch_of(varied, [3])["pixel_values"][0])
    shifted = batch_of(augmented(data, Augmentation(flip=1.0), 0), range(9))["pixel_values"]
    assert (shifted <= black + 1e-3).all()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"flip": 2.0}, "flip is 2"),
        ({"crop": 0.0}, "crop is 0"),
        ({"mixup": -1.0}, "mixup is -1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"shift": 4, "crop": 0.5}, "one of the two crops"),
        ({"policy": "random"}, "policy is 'random'"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Augmentation(**wrong)


@pytest.mark.parametrize("policy", ["rand-m10-p1-inc1", "rand-m0-p1", "original", "v0", "augmix-m10"])
def test_policies_run_at_their_greatest_magnitude(digits, policy):
    images = augmented(digits, Augmentation(policy=policy), 0).train
    for draw in range(4):
        batch = images.__getitems__([image + draw * len(images) for image in range(32)])
        assert batch["pixel_values"].isfinite().all()


def test_a_policy_that_timm_does_not_know_and_data_without_images_are_refused(digits, tmp_path):
    with pytest.raises(ValueError, match="rand-q9"):
        augmented(digits, Augmentation(policy="rand-q9"), 0)
    (tmp_path / "a.txt").write_text("words " * 500)
    text = load_data(f"text:{tmp_path / 'a.txt'}", sequence_length=8)
    with pytest.raises(ValueError, match="is for images"):
        augmented(text, DEIT, 0)
