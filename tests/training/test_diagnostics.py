import math

import pytest
import torch

import formix
from formix.analysis import analyze
from formix.training.diagnostics import diagnose


def test_an_image_models_figures_are_those_of_its_tensors(digits, make_model):
    model, batch = make_model("relu").train(), digits.train.__getitems__(range(8))
    figures = diagnose(model, batch)
    assert model.training
    assert set(figures) == {f"{kind}/blocks.{i}{part}" for i in (0, 1) for kind, part in
                            (("rms", ".attn"), ("active", ".attn"), ("spread", ""))}  # fmt: skip
    model.eval()
    x = model.blocks[0].norm1(model._tokens(batch["pixel_values"]))
    assert figures["rms/blocks.0.attn"] == pytest.approx(model.blocks[0].attn(x).square().mean().sqrt().item())
    q, k, _ = model.blocks[0].attn.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    q, k = model.blocks[0].attn.q_norm(q), model.blocks[0].attn.k_norm(k)
    share = (torch.einsum("bhqd,bhkd->bhqk", q, k) > 0).double().mean().item()
    assert figures["active/blocks.0.attn"] == pytest.approx(share)
    spreads = [row.spread_after_ffn for row in analyze(model, [batch["pixel_values"]]).layers]
    assert [figures[f"spread/blocks.{i}"] for i in (0, 1)] == pytest.approx(spreads)


@pytest.mark.parametrize("design", formix.list_designs())
def test_every_design_has_figures(digits, make_model, design):
    figures = diagnose(make_model(design), digits.train.__getitems__(range(4)))
    assert sum(name.startswith("rms/") for name in figures) == 2
    assert any(name.startswith("active/") for name in figures) == (design == "relu")
    assert all(math.isfinite(value) for value in figures.values())


def test_only_visible_scores_count_in_a_decoder():
    model = formix.create_model("gpt2-nano", "relu", vocab_size=16, n_positions=8, n_layer=1)
    figures = diagnose(model, {"input_ids": torch.zeros(1, 8, dtype=torch.int64)})
    seen = []
    handle = model.transformer.h[0].attn.c_attn.register_forward_hook(lambda module, args, out: seen.append(out))
    model.eval()(torch.zeros(1, 8, dtype=torch.int64))
    handle.remove()
    q, k, _ = seen[0].unflatten(-1, (3, 4, 32)).permute(2, 0, 3, 1, 4)  # [B, H, N, D]
    scores = q @ k.transpose(-2, -1)
    visible = torch.ones(8, 8, dtype=torch.bool).tril().expand_as(scores)
    assert figures["active/transformer.h.0.attn"] == pytest.approx((scores[visible] > 0).double().mean().item())


def test_blocks_with_rotary_positions_have_all_figures():
    model = formix.create_model("vit_small_patch16_dinov3", design="relu", img_size=32, depth=2, num_classes=2)
    figures = diagnose(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert [name for name in figures if name.startswith("rms/")] == ["rms/blocks.0.attn", "rms/blocks.1.attn"]
    assert [name for name in figures if name.startswith("spread/")] == ["spread/blocks.0", "spread/blocks.1"]


def test_a_compiled_model_is_looked_into_as_it_was_written(digits, make_model):
    model, batch = make_model("relu"), digits.train.__getitems__(range(4))
    expected = diagnose(model, batch)
    model.compile(backend="eager")
    assert diagnose(model, batch) == expected
    assert model._compiled_call_impl is not None
