"""formix's models by timm's and transformers' own functions, in a process that has imported formix."""

import json

import pytest
import timm
import torch
import transformers as hf
from transformers import AutoConfig, AutoModel

import formix
from formix.models.text import FAMILIES, create_text_model
from formix.models.vit import FormixVisionTransformer

VIT = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}


@pytest.mark.parametrize("design", formix.list_designs())
def test_timm_loads_a_directory(design, tmp_path):
    model = formix.create_model("vit_tiny_patch16_224", design, **VIT).eval()
    formix.save(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert isinstance(loaded, FormixVisionTransformer)
    assert loaded.design == formix.design(design)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "sima_nano_12_p16", "activator_32_p4"])
def test_transformers_auto_classes_load_a_directory_of_images(name, tmp_path):
    arguments = VIT if name.startswith("vit") else {"img_size": 32, "num_classes": 5}
    model = formix.create_model(name, "relu+skip" if name.startswith("vit") else None, **arguments).eval()
    formix.save(model, tmp_path)
    x = torch.randn(2, 3, 32, 32)
    classifier = hf.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    features = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(classifier(x).logits, model(x))
        assert torch.equal(features(x).last_hidden_state, model.forward_features(x))


def test_timm_s_arguments_for_a_directory(tmp_path):
    model = formix.create_model("vit_tiny_patch16_224", "sima", **VIT).eval()
    formix.save(model, tmp_path)
    other_head = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=9)
    assert other_head.num_classes == 9
    assert torch.equal(other_head.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    untrained = timm.create_model(f"local-dir:{tmp_path}")
    assert untrained.design == formix.design("sima")
    assert not torch.equal(untrained.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=48)
    assert larger(torch.randn(1, 3, 48, 48)).shape == (1, 5)
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    assert data["input_size"] == (3, 32, 32)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]


def test_timm_creates_by_name():
    model = timm.create_model("formix_vit", base="vit_tiny_patch16_224", design="relu+paf", **VIT)
    assert isinstance(model, FormixVisionTransformer)
    assert model.design == formix.design("relu+paf")
    assert timm.is_model("formix_vit")
    assert "formix_vit" in timm.list_models("formix*")
    with pytest.raises(ValueError, match="'rellu' is no design"):
        timm.create_model("formix_vit", base="vit_tiny_patch16_224", design="rellu")


BASES = [  # of every class of trunk, one of them with npz weights in timm's hub
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_relpos_small_patch16_224",
    "vit_small_patch16_rope_224",
]


@pytest.mark.parametrize("base", BASES)
def test_timm_s_description_of_pretrained_weights(base, tmp_path):
    """A file of the user's comes before the weights of the base, as for the base itself in timm."""
    size = {"depth": 2, "img_size": 32, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model("formix_vit", base=base, design="relu", **size)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    file = {"file": str(tmp_path / "w.pth")}
    cfg = {k: model.pretrained_cfg[k] for k in ("num_classes", "first_conv", "classifier", "input_size")}
    for how in ({"pretrained_cfg_overlay": file}, {"pretrained_cfg": file | cfg}):
        loaded = timm.create_model("formix_vit", base=base, design="relu", pretrained=True, **size, **how)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
        assert loaded.pretrained_cfg["file"] == file["file"]
        other = timm.create_model("formix_vit", base=base, design="relu", pretrained=True, num_classes=7, **size, **how)
        assert other.num_classes == 7
        assert torch.equal(other.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_where_weights_came_from_is_not_saved(tmp_path):
    """A path of this machine has no place in a model's config."""
    softmax = timm.create_model("vit_tiny_patch16_224", **VIT)
    torch.save(softmax.state_dict(), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 5}
    model = formix.create_model("vit_tiny_patch16_224", "relu", pretrained=True, pretrained_cfg_overlay=overlay, **VIT)
    assert torch.equal(model.head.weight, softmax.head.weight)
    formix.save(model, tmp_path)
    assert "w.pth" not in (tmp_path / "config.json").read_text()
    assert torch.equal(formix.load(tmp_path).head.weight, softmax.head.weight)


def test_timm_s_features(tmp_path):
    model = formix.create_model("vit_tiny_patch16_224", "relu", **VIT | {"depth": 4}).eval()
    formix.save(model, tmp_path)
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        got = features(x)
        want = model.forward_intermediates(x, indices=[1, 2, 3], intermediates_only=True)
    assert len(got) == 3
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match="local-dir:"):
        formix.create_model(tmp_path, features_only=True)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_relpos_small_patch16_224"]
)
def test_features_by_name(name):
    features = formix.create_model(name, "relu", features_only=True, out_indices=[0, 1], **VIT | {"depth": 2})
    assert [y.shape for y in features(torch.randn(1, 3, 32, 32))] == [(1, 24, 2, 2)] * 2
    with pytest.raises(ValueError, match="features_only is for fresh weights"):
        formix.create_model(name, "relu", features_only=True, pretrained=True)


TASKS = [(family, task) for family, (_, tasks) in FAMILIES.items() for task in tasks]
TINY = {"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 24, "vocab_size": 50}
AUTOS = {
    "causal-lm": hf.AutoModelForCausalLM,
    "masked-lm": hf.AutoModelForMaskedLM,
    "sequence-classification": hf.AutoModelForSequenceClassification,
    "token-classification": hf.AutoModelForTokenClassification,
    "question-answering": hf.AutoModelForQuestionAnswering,
    "multiple-choice": hf.AutoModelForMultipleChoice,
    "features": hf.AutoModel,
}
NAMES = {
    "gpt2": "gpt2-nano",
    "bert": "bert-tiny",
    "roberta": "roberta-tiny",
    "distilbert": "distilbert-base",
    "llama": "llama-nano",
}


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_auto_classes_give_the_class_of_the_task(family, task, tmp_path):
    tiny = {k: v for k, v in TINY.items() if k != "intermediate_size" or family != "gpt2"}
    tiny |= {"num_key_value_heads": 1} if family == "llama" else {}
    model = create_text_model(NAMES[family], "relu", task=task, **tiny)
    config_class, classes = FAMILIES[family]
    assert type(model) is classes[task]
    model.save_pretrained(tmp_path)
    loaded = AUTOS[task].from_pretrained(tmp_path)
    assert type(loaded) is classes[task]
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is config_class
    assert formix.design(config.design) == formix.design("relu")
    assert type(AutoModel.from_pretrained(tmp_path)) is classes["features"]
    ours = model.state_dict()
    assert all(torch.equal(weight, ours[name]) for name, weight in loaded.state_dict().items())
