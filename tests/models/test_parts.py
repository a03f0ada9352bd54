"""Where layers have what, for every family."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers as hf
from torch import nn

import formix
from formix.design import Softmax
from formix.models.parts import find_layers, layers

VIT = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
TEXT = {
    "vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48,
}  # fmt: skip
VITS = (
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_relpos_small_patch16_224",
    "vit_relpos_small_patch16_rpn_224", "vit_base_patch16_rpn_224", "eva02_base_patch14_224", "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3", "vit_small_patch16_rope_224", "vit_dlittle_patch16_reg1_gap_256",
)  # fmt: skip
TEXTS = ("bert-tiny", "roberta-base", "distilbert-base", "gpt2-nano", "llama-nano")
STOCK = {
    "bert": (hf.BertConfig, hf.BertModel), "roberta": (hf.RobertaConfig, hf.RobertaModel),
    "xlm-roberta": (hf.XLMRobertaConfig, hf.XLMRobertaModel), "llama": (hf.LlamaConfig, hf.LlamaModel),
    "mistral": (hf.MistralConfig, hf.MistralModel), "qwen2": (hf.Qwen2Config, hf.Qwen2Model),
    "qwen3": (hf.Qwen3Config, hf.Qwen3Model), "camembert": (hf.CamembertConfig, hf.CamembertModel),
}  # fmt: skip


def check(model: nn.Module, depth: int, *, formix_design: bool) -> None:
    """Every matrix of a layer belongs to its mixer or its FFN; the FFN's input and the mixer's output are named."""
    found = layers(model)
    assert len(found) == depth
    for layer in found:
        assert model.get_submodule(layer.name) is layer.block
        mixer, ffn = set(layer.mixer.modules()), {m for part in layer.ffn for m in part.modules()}
        linear = {m for m in layer.block.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
        assert linear <= mixer | ffn | {layer.branch}
        assert set(layer.ffn_in) <= ffn & linear
        assert bool(layer.ffn_in) == bool(layer.ffn)
        for norm, name in zip(layer.norms, layer.norm_names, strict=True):
            assert norm is None or model.get_submodule(name) is norm
        assert layer.norms[0] is not None
        assert isinstance(layer.scaled, nn.Module)
        assert (layer.design is not None) == formix_design
        if layer.design is not None and layer.design.mixer.has_keys:
            assert layer.out in linear
            assert layer.heads > 0


@pytest.mark.parametrize("design", ["softmax", "relu", "sima"])
@pytest.mark.parametrize("name", VITS)
def test_vision_transformers(name: str, design: str) -> None:
    size = VIT | ({"img_size": 28} if "patch14" in name else {})
    check(formix.create_model(name, design, **size), 2, formix_design=True)
    check(timm.create_model(name, **size), 2, formix_design=False)


@pytest.mark.parametrize("design", ["relu", "paf", "activator", "activator-glu", "skip", "relu+parallel"])
def test_formix_blocks(design: str) -> None:
    check(formix.create_model("vit_tiny_patch16_224", design, **VIT), 2, formix_design=True)


@pytest.mark.parametrize("design", ["softmax", "relu+paf", "skip", "activator"])
@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str, design: str) -> None:
    chosen = formix.design(design, layers={1: Softmax()} if design == "activator" else {})  # decoders must mix
    fields = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 50} if name.startswith("gpt2") else TEXT
    with torch.device("meta"):
        model = formix.create_model(name, chosen, **fields)
    check(model, 2, formix_design=True)


@pytest.mark.parametrize("family", STOCK)
def test_transformers(family: str) -> None:
    config, kind = STOCK[family]
    with torch.device("meta"):
        check(kind(config(**TEXT)), 2, formix_design=False)


def test_other_trunks() -> None:
    with torch.device("meta"):
        check(hf.DistilBertModel(hf.DistilBertConfig(n_layers=2)), 2, formix_design=False)
        check(hf.GPT2Model(hf.GPT2Config(n_layer=2)), 2, formix_design=False)
        check(formix.create_model("activator_32_p4"), 4, formix_design=False)
        check(formix.create_model("ninformer_32_p4"), 4, formix_design=False)
        check(formix.create_model("sima_nano_12_p16"), 12, formix_design=True)
        check(timm.create_model("xcit_nano_12_p16_224"), 12, formix_design=False)
    assert len(layers(formix.create_model("cvt-13", "relu"))) == 13


def test_models_without_such_layers() -> None:
    assert find_layers(nn.Linear(2, 2)) == []
    with pytest.raises(ValueError, match="no layers that formix can look into"):
        layers(nn.Linear(2, 2))
