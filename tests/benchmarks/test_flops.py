import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import formix
from formix.benchmarks import count_flops, flops_by_module, mixer_flops
from formix.design import Pointwise, Sima, Softmax

SIZES = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 2}


def counted_by_torch(model, *args, **kwargs) -> int:
    """PyTorch's counter on graphs without fused attention or custom operators."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*args, **kwargs)
    return counter.get_total_flops()


@pytest.fixture(autouse=True)
def _reference_only(monkeypatch):
    """Custom operators are invisible to PyTorch's counter; count the plain form."""
    from formix.ops import l1, pointwise

    monkeypatch.setattr(l1, "native_module", lambda: None)
    monkeypatch.setattr(pointwise, "native_module", lambda: None)


@pytest.mark.parametrize("design", formix.list_designs())
def test_images_agree_with_torchs_counter(design):
    model = formix.create_model("vit_tiny_patch16_224", design=design, **SIZES).eval()
    image = torch.randn(2, 3, 32, 32)
    assert count_flops(model, image) == counted_by_torch(model, image)


@pytest.mark.parametrize("design", ["softmax", "relu", "paf", "skip", "relu+parallel+skip"])
def test_decoders_agree_with_torchs_counter(design):
    model = formix.create_model("gpt2-nano", design=design, vocab_size=64, n_positions=32).eval()
    ids = torch.zeros(2, 24, dtype=torch.long)
    assert count_flops(model, {"input_ids": ids}) == counted_by_torch(model, input_ids=ids)


@pytest.mark.parametrize("design", ["softmax", "relu", "sima", "paf", "activator"])
def test_encoders_agree_with_torchs_counter(design):
    model = formix.create_model("bert-tiny", design=design, vocab_size=64).eval()
    inputs = {"input_ids": torch.zeros(2, 24, dtype=torch.long), "attention_mask": torch.ones(2, 24, dtype=torch.long)}
    assert count_flops(model, inputs) == counted_by_torch(model, **inputs)


def test_vit_small_is_what_is_published_of_it():
    model = formix.create_model("vit_small_patch16_224", design="softmax")
    assert count_flops(model, torch.zeros(1, 3, 224, 224)) / 2 == pytest.approx(4.6e9, rel=0.01)


def test_the_mixers_formulas():
    assert mixer_flops(Softmax(), heads=6, queries=197, keys=197, head_dim=64) == 4 * 6 * 197**2 * 64
    assert mixer_flops(Pointwise(), heads=6, queries=10, keys=20, head_dim=64) == 4 * 6 * 10 * 20 * 64
    assert mixer_flops(Sima(), heads=6, queries=197, keys=197, head_dim=64) == 4 * 6 * 197 * 64**2
    assert mixer_flops(Sima(), heads=6, queries=16, keys=16, head_dim=64) == 4 * 6 * 16**2 * 64


def test_modules_are_named_and_the_model_is_left_alone():
    model = formix.create_model("vit_tiny_patch16_224", design="sima", **SIZES)
    counts = flops_by_module(model, torch.zeros(1, 3, 32, 32))
    assert {"patch_embed.proj", "blocks.0.attn", "blocks.1.mlp.fc2", "head"} <= set(counts)
    assert next(model.parameters()).device.type == "cpu"
    assert not any(m._forward_hooks for m in model.modules())
