"""The two analyses of PAF's second version: their formulas, and what they see in each family."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    CvtConfig,
    CvtForImageClassification,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

import formix
from formix.analysis import analyze, mean_cosine, spread

ENCODER = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**ENCODER, "vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 1, "initializer_range": 0.2}
GPT2 = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 60, "n_positions": 40, "initializer_range": 0.2}


def batch() -> dict[str, Tensor]:
    ids, mask = torch.randint(5, 60, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def by_hand(x: Tensor) -> tuple[float, float]:
    """spread and mean cosine of one sequence [N, C], pair by pair."""
    mean = sum(x) / len(x)
    around = sum(((t - mean) ** 2).sum() for t in x) ** 0.5 / sum((t**2).sum() for t in x) ** 0.5
    cosines = [torch.cosine_similarity(x[i], x[j], dim=0) for i in range(len(x)) for j in range(len(x)) if i != j]
    return float(around), float(sum(cosines) / len(cosines))


def test_formulas_and_masks() -> None:
    x = torch.randn(2, 7, 5, dtype=torch.float64) + 1
    mask = torch.tensor([[True] * 7, [True, False, True, True, False, True, False]])
    for row in range(2):
        r1, cosine = by_hand(x[row, mask[row]])
        assert float(spread(x, mask)[row]) == pytest.approx(r1, abs=1e-12)
        assert float(mean_cosine(x, mask)[row]) == pytest.approx(cosine, abs=1e-12)


def test_extremes() -> None:
    same = torch.ones(1, 6, 4) * torch.tensor([1.0, -2.0, 3.0, 0.5])
    assert spread(same).item() == pytest.approx(0, abs=1e-7)
    assert mean_cosine(same).item() == pytest.approx(1)
    opposite = torch.cat([same[:, :3], -same[:, :3]], dim=1)
    assert spread(opposite).item() == pytest.approx(1)
    assert mean_cosine(opposite).item() == pytest.approx(-0.2)  # 12 pairs of +1, 18 of -1
    assert spread(torch.zeros(1, 3, 4)).item() == 0


@pytest.mark.parametrize("form", ["series", "paf", "paf-official", "parallel"])
@torch.no_grad()
def test_states_are_those_between_the_parts(form: str) -> None:
    """Every figure once more, from the layer's own parts applied by hand."""
    design = {"series": formix.design("softmax"), "paf-official": formix.design("paf", official=True)}
    model = formix.create_model("bert-tiny", design=design.get(form, form), task="features", **TEXT).eval()
    given = batch()
    result = analyze(model, [given])
    x, mask = model.embeddings(given["input_ids"]), given["attention_mask"].bool()
    for i, layer in enumerate(model.encoder.layer):
        norm1 = layer.attention.output.LayerNorm
        h = norm1(x) if form == "parallel" else x
        branch = layer.attention(h, mask[:, None, None], None)[0]
        after = norm1(x + branch) if form == "series" else x + branch
        y = layer(x, None, None, False, mask[:, None, None])
        figures = result.layers[i]
        expected = {
            "spread_input": [by_hand(x[b, mask[b]].double())[0] for b in range(3)],
            "spread_after_attention": [by_hand(after[b, mask[b]].double())[0] for b in range(3)],
            "spread_after_ffn": [by_hand(y[b, mask[b]].double())[0] for b in range(3)],
            "cosine_after_attention": [by_hand(after[b, mask[b]].double())[1] for b in range(3)],
            "cosine_after_ffn": [by_hand(y[b, mask[b]].double())[1] for b in range(3)],
            "attention_ratio": (branch.norm(dim=-1) / x.norm(dim=-1))[mask].tolist(),
        }
        for name, values in expected.items():
            assert getattr(figures, name) == pytest.approx(sum(values) / len(values), rel=1e-5), name
        x = y
    assert (result.sequences, result.tokens) == (3, 23)


def test_stock_and_formix_models_of_the_same_weights_agree() -> None:
    pairs = [
        (BertModel(BertConfig(**TEXT)), "bert-tiny", TEXT),
        (GPT2Model(GPT2Config(**GPT2)), "gpt2-nano", GPT2),
        (LlamaModel(LlamaConfig(**TEXT, num_key_value_heads=2)), "llama-nano", {**TEXT, "num_key_value_heads": 2}),
    ]
    for stock, name, fields in pairs:
        ours = formix.create_model(
            name, task="features", **{**fields, "rms_norm_eps": 1e-6} if "llama" in name else fields
        )
        ours.load_state_dict(stock.state_dict(), strict=True)
        given = batch()
        a, b = analyze(stock, [given]), analyze(ours, [given])
        for x, y in zip(a.layers, b.layers, strict=True):
            for field in ("spread_input", "spread_after_attention", "spread_after_ffn", "attention_ratio"):
                assert getattr(x, field) == pytest.approx(getattr(y, field), rel=1e-4), (name, field)
        assert a.design is None
        assert formix.design(b.design) == formix.design("softmax")


def test_choices_count_as_sequences() -> None:
    model = formix.create_model("bert-tiny", "paf", task="multiple-choice", **TEXT)
    given = batch()  # three sequences, here of one question
    asked = analyze(model, [{name: tensor[None] for name, tensor in given.items()}])
    alone = analyze(model.bert, [given])
    assert [replace(layer, name="") for layer in asked.layers] == [replace(layer, name="") for layer in alone.layers]
    assert (asked.sequences, asked.tokens) == (3, 23)


@pytest.mark.parametrize("design", ["softmax", "relu+skip", "relu+parallel", "sima", "activator"])
def test_vision_transformers(design: str) -> None:
    """The fused parallel block must not hide its branch; timm's own model gives the same figures."""
    fields = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "init_values": 0.5}
    model = formix.create_model("vit_tiny_patch16_224", design=design, num_classes=3, **fields).eval()
    images, seen = torch.randn(2, 3, 32, 32), []
    logits = model(images)
    handle = model.blocks[1].ls1.register_forward_hook(lambda m, a, y: seen.append(y))
    model(images)
    handle.remove()
    result = analyze(model, [images, {"pixel_values": images, "labels": torch.zeros(2)}])
    assert (len(result.layers), result.sequences, result.tokens) == (3, 4, 4 * model.blocks[1].attn(seen[0]).shape[1])
    assert torch.equal(model(images), logits)  # hooks are gone
    assert result.layers[1].attention_ratio > 0
    if design == "softmax":
        stock = timm.create_model("vit_tiny_patch16_224", num_classes=3, **fields).eval()
        stock.load_state_dict(model.state_dict())
        for x, y in zip(analyze(stock, [images]).layers, analyze(model, [images]).layers, strict=True):
            assert x.attention_ratio == pytest.approx(y.attention_ratio, rel=1e-4)
            assert x.spread_after_attention == pytest.approx(y.spread_after_attention, rel=1e-4)


@torch.no_grad()
def test_xcit_and_sima() -> None:
    """The patches' layers, by hand: x + gamma1 A(LN x), then local patch interaction and the FFN."""
    size = {"depth": 2, "img_size": 64}
    stock = timm.create_model("xcit_nano_12_p16_224", **size)
    for model in (formix.create_model("sima_nano_12_p16", **size), stock):
        torch.nn.init.normal_(model.blocks[0].gamma1)
        images, states = torch.randn(2, 3, 64, 64), []
        result = analyze(model, [images])
        assert (len(result.layers), result.sequences, result.tokens) == (2, 2, 2 * 16)
        block = model.eval().blocks[0]
        block.register_forward_hook(lambda m, a, y, states=states: states.extend((a[0], y)))
        model(images)
        x, y = states
        branch = block.gamma1 * block.attn(block.norm1(x))
        figures = result.layers[0]
        assert figures.attention_ratio == pytest.approx(float((branch.norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-4)
        assert figures.spread_after_attention == pytest.approx(float(spread(x + branch).mean()), rel=1e-4)
        assert figures.spread_after_ffn == pytest.approx(float(spread(y).mean()), rel=1e-4)


@torch.no_grad()
def _by_hand(model, block, images, branch) -> None:
    """The figures of `block`, whose attention branch is `branch(input, *more)`, against those from its own states."""
    figures, states = next(f for f in analyze(model, [images]).layers if model.get_submodule(f.name) is block), []
    handle = block.register_forward_hook(lambda m, a, k, y: states.extend((a, k, y)), with_kwargs=True)
    model.eval()(images)
    handle.remove()
    given, named, y = states
    x, a = given[0], branch(*given, **named)
    assert figures.attention_ratio == pytest.approx(float((a.norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-4)
    assert figures.spread_after_attention == pytest.approx(float(spread(x + a).mean()), rel=1e-4)
    assert figures.spread_after_ffn == pytest.approx(float(spread(y).mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["vit_small_patch16_rope_224", "eva02_tiny_patch14_224"])
def test_rotary_positions(name: str) -> None:
    size = {"depth": 2, "img_size": 56, "embed_dim": 32, "num_heads": 2, "init_values": 0.5}
    models = [formix.create_model(name, design, **size) for design in ("relu", "relu+parallel")]
    for model in (timm.create_model(name, **size), *models):
        block, images = model.blocks[1], torch.randn(2, 3, 56, 56)
        _by_hand(model, block, images, lambda x, b=block, **k: b.gamma_1 * b.attn(b.norm1(x), **k))


@pytest.mark.parametrize("name", ["vit_base_patch16_rpn_224", "vit_relpos_small_patch16_rpn_224"])
def test_norms_behind_the_branches(name: str) -> None:
    size = {"depth": 2, "img_size": 32, "embed_dim": 32, "num_heads": 2, "init_values": 0.5}
    for model in (timm.create_model(name, **size), formix.create_model(name, "relu", **size)):
        block, images = model.blocks[1], torch.randn(2, 3, 32, 32)
        _by_hand(model, block, images, lambda x, b=block, **k: b.norm1(b.attn(x, **k)))


def test_cvt() -> None:
    size = {"depth": [1, 2, 3], "embed_dim": [16, 48, 96], "drop_path_rate": [0.0, 0.0, 0.0]}
    stock = CvtForImageClassification(CvtConfig(**size)).eval()
    for model in (stock, formix.create_model("cvt-13", "relu", **size), formix.create_model("cvt-13", "sima", **size)):
        block, images = model.cvt.encoder.stages[2].layers[1], torch.randn(2, 3, 64, 64)
        assert len(analyze(model, [images]).layers) == 6
        _by_hand(model, block, images, lambda x, *size, b=block: b.attention(b.layernorm_before(x), *size))


def test_json_table_and_the_models_state() -> None:
    model = RobertaForMaskedLM(RobertaConfig(**TEXT)).train()
    result = analyze(model, (batch() for _ in range(5)), max_batches=2)
    assert result.sequences == 6
    assert model.training
    data = json.loads(result.to_json())
    assert [layer["layer"] for layer in data["layers"]] == [0, 1, 2]
    assert data["layers"][0]["name"] == "roberta.encoder.layer.0"
    lines = str(result).splitlines()
    assert len(lines) == 3 + 3
    assert f"{result.layers[2].attention_ratio:.4f}" in lines[-1]


def test_figures_that_are_no_numbers_are_null_in_json() -> None:
    model = RobertaForMaskedLM(RobertaConfig(**TEXT))
    with torch.no_grad():
        model.roberta.encoder.layer[1].attention.output.LayerNorm.weight.fill_(torch.nan)
    figures = json.loads(analyze(model, [batch()]).to_json())["layers"]
    assert figures[0]["spread_after_ffn"] > 0
    assert figures[1]["spread_after_ffn"] is None


def test_what_cannot_be_analysed_is_refused() -> None:
    with pytest.raises(ValueError, match="no layers"):
        analyze(torch.nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="several branches at once"):
        analyze(formix.create_model("vit_base_patch16_xp_224", "relu", depth=1, img_size=32), [])
    model = formix.create_model("bert-tiny", **TEXT)
    one = {"input_ids": torch.tensor([[5, 1]]), "attention_mask": torch.tensor([[1, 0]])}
    for batches in ([], [one]):
        with pytest.raises(ValueError, match="two tokens"):
            analyze(model, batches)
