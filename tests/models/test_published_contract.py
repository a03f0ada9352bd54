"""What timm's own model tests expect, of every published model; saving and loading under every loader."""

import json

import pytest
import timm
import torch
from oracles import close
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay

import formix
from formix.models.published import PUBLISHED

# name -> arguments that make it small enough for a test; one of each size family, all four Activators
SMALL = {
    "sima_nano_12_p16": {"depth": 2, "img_size": 48},
    "sima_tiny_24_p8": {"depth": 2, "img_size": 24},
    "formix_xcit": {"base": "xcit_nano_12_p16_224", "design": "sima", "depth": 2, "img_size": 48},
    "activator_32_p4": {"depth": 2},
    "activator_glu_32_p4": {"depth": 2},
    "uniform_activator_32_p4": {"depth": 2},
    "ninformer_32_p4": {"depth": 2},
    "relu_vit_small_patch16_224": {"depth": 2, "img_size": 48},
    "relu_vit_small_patch32_224": {
        "depth": 2, "img_size": 64, "global_pool": "token", "rep_size": True, "gate": "silu", "head_zero_init": False,
    },
}  # fmt: skip


def create(name: str, **arguments):
    model = timm.create_model(name, **SMALL[name], num_classes=10, **arguments)
    size = SMALL[name].get("img_size", 32)
    return model, torch.randn(2, 3, size, size)


def blocks(model):
    return model.model if hasattr(model, "patcher") else model.blocks


def test_every_published_name_is_registered():
    assert len(PUBLISHED) == 24
    for name, published in PUBLISHED.items():
        assert timm.is_model(name)
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.input_size == published.cfg["input_size"]
        assert not cfg.has_weights


@pytest.mark.parametrize("name", SMALL)
def test_forward_backward_and_checkpointing(name):
    model, images = create(name, proj_drop_rate=0.0)
    model.train()
    logits = model(images)
    assert logits.shape == (2, 10)
    cotangent = torch.randn_like(logits)
    logits.backward(cotangent)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert all(g is not None for g in gradients.values())
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(images).backward(cotangent)
    for n, p in model.named_parameters():
        close(p.grad, gradients[n], 1e-4, n)


@pytest.mark.parametrize("name", SMALL)
def test_intermediates_and_features(name):
    model, images = create(name)
    model.eval()
    final, outputs = model.forward_intermediates(images)
    close(final, model.forward_features(images), 1e-6)
    assert [y.shape[:2] for y in outputs] == [(2, model.num_features)] * 2
    (last,) = model.forward_intermediates(images, indices=1, intermediates_only=True, output_fmt="NLC")
    close(last.transpose(1, 2).reshape(outputs[1].shape), outputs[1], 1e-6)
    head = model.forward_head(model.forward_features(images))
    close(head, model(images), 1e-6)
    assert model.forward_head(final, pre_logits=True).shape == (2, model.num_features)
    features, _ = create(name, features_only=True, out_indices=(0, 1))
    assert [y.shape for y in features(images)] == [y.shape for y in outputs]
    model.prune_intermediate_layers([0])
    assert len(blocks(model)) == 1
    assert model.forward_intermediates(images, indices=[0], intermediates_only=True)[0].shape == outputs[0].shape


@pytest.mark.parametrize("name", SMALL)
def test_classifier_groups_and_decay(name):
    model, images = create(name)
    model.reset_classifier(7)
    assert model.eval()(images).shape == (2, 7)
    assert model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(images).dim() == 3

    groups = group_parameters(model, model.group_matcher())
    assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())
    no_decay, decay = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    assert no_decay["weight_decay"] == 0
    assert len(no_decay["params"]) + len(decay["params"]) == len(list(model.parameters()))
    assert isinstance(model.no_weight_decay(), set)


@pytest.mark.parametrize("name", SMALL)
def test_save_load_and_local_dir(name, tmp_path):
    model, images = create(name)
    model.eval()
    expected = model(images)
    formix.save(model, tmp_path)
    for loaded in (
        formix.load(tmp_path),
        formix.create_model(tmp_path).eval(),
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
    ):
        assert type(loaded) is type(model)
        assert loaded.design == model.design
        close(loaded(images), expected, 1e-6)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == name
    assert formix.load(tmp_path).pretrained_cfg["input_size"] == [3, *images.shape[-2:]]


def test_a_changed_head_and_arguments_are_saved(tmp_path):
    model = formix.create_model("sima_nano_12_p16", depth=1, img_size=32, num_classes=4, num_heads=1).eval()
    model.reset_classifier(6, "avg")
    formix.save(model, tmp_path)
    images = torch.randn(1, 3, 32, 32)
    loaded = formix.load(tmp_path)
    assert (loaded.num_classes, loaded.global_pool, loaded.blocks[0].attn.num_heads) == (6, "avg", 1)
    close(loaded(images), model(images), 1e-6)


def test_another_design_from_a_directory(tmp_path):
    model = formix.create_model("relu_vit_small_patch16_224", depth=2, img_size=32, num_classes=4, head_bias=-10.0)
    formix.save(model, tmp_path)
    softmax = formix.create_model(tmp_path, design="softmax(qk_norm=true)")
    assert torch.equal(softmax.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    assert softmax.design.mixer.kind == "softmax"
    assert (softmax.head.bias == -10).all()
    gated = formix.design("relu", qk_norm=True, gate="silu")
    with pytest.raises(ValueError, match="no weights for"):
        formix.create_model(tmp_path, design=gated)


@pytest.mark.parametrize("name", ["sima_nano_12_p16", "formix_xcit", "activator_32_p4", "relu_vit_small_patch16_224"])
def test_export(name):
    model, images = create(name)
    model.eval()
    program = torch.export.export(model, (images,), strict=False)
    close(program.module()(images), model(images), 1e-5)
    traced = torch.jit.trace(model, images, check_trace=False)
    close(traced(images), model(images), 1e-5)


@pytest.mark.parametrize("name", ["sima_nano_12_p16", "activator_32_p4", "relu_vit_small_patch16_224"])
def test_half_precision_and_other_sizes(name):
    model, images = create(name)
    for dtype in (torch.bfloat16, torch.float16):
        assert model.eval().to(dtype)(images.to(dtype)).isfinite().all()
    if not name.startswith("relu"):
        assert model.float()(torch.randn(1, 3, 64, 32)).shape == (1, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["sima_nano_12_p16", "activator_32_p4", "ninformer_32_p4", "relu_vit_small_patch16_224"]
)
def test_compile(name):
    model, images = create(name)
    model.eval()
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images), 1e-4)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="no_such_argument"):
        formix.create_model("sima_nano_12_p16", no_such_argument=1)
    with pytest.raises(ValueError, match="multiple of patch_size"):
        formix.create_model("activator_32_p4", img_size=30)
    with pytest.raises(ValueError, match="activation"):
        formix.create_model("relu_vit_small_patch16_224", activation="tanh")
