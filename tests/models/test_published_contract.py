"""What timm's own model tests expect, of every published model; saving and loading under every loader."""

import copy
import io
import json

import pytest
import timm
import torch
from oracles import close
from timm.layers import resample_abs_pos_embed
from timm.models import create_feature_extractor, group_parameters
from timm.optim import param_groups_weight_decay
from torchvision.models import feature_extraction

import formix
from formix.models.published import PUBLISHED
from formix.models.script import ScriptableClassAttention
from formix.models.timm_registry import ENTRIES

ACTIVATORS = ["activator_32_p4", "activator_glu_32_p4", "uniform_activator_32_p4", "ninformer_32_p4"]
# variants of registered names: the name and more arguments
VARIANTS = {
    "relu_vit_with_token": (
        "relu_vit_small_patch32_224",
        {"global_pool": "token", "rep_size": True, "gate": "silu", "head_zero_init": False},
    ),
    "formix_vit_relu_paf_skip": ("formix_vit", {"design": "relu+paf+skip"}),
}
REGISTERED = ["formix_vit", *ENTRIES]  # a model is tested by being registered
NAMES = [*REGISTERED, *VARIANTS]
# one of each class and kind, for what takes long
CLASSES = ["formix_vit", "formix_xcit", "sima_nano_12_p16", "sima_tiny_24_p8", "relu_vit_small_patch16_224", *VARIANTS]
CLASSES += ACTIVATORS
SCRIPTED = ["sima_nano_12_p16", "relu_vit_with_token", "formix_vit_relu_paf_skip", *ACTIVATORS]


def small(name: str) -> tuple[str, dict]:
    """A registered name and arguments that make it small enough for a test."""
    name, more = VARIANTS.get(name, (name, {}))
    if name in ACTIVATORS:
        size = {"embed_dim": 32} if name.startswith("uniform") else {"embed_dim": 32, "hidden_dim": 48}
    elif name.startswith(("formix_vit", "relu_vit")):
        patch = int(name.split("patch")[1].split("_")[0]) if "patch" in name else 16
        size = {"embed_dim": 48, "num_heads": 3, "img_size": 3 * patch}
    elif name == "formix_xcit":
        size = {"base": "xcit_nano_12_p16_224", "img_size": 48}
    else:
        size = {"embed_dim": 32, "num_heads": 4, "img_size": 3 * int(name.rsplit("_p", 1)[1])}
    return name, {"depth": 2, "num_classes": 10, **size, **more}


def create(name: str, **more):
    name, arguments = small(name)
    model = timm.create_model(name, **arguments, **more)
    size = arguments.get("img_size", 32)
    return model, torch.randn(2, 3, size, size)


def blocks(model):
    return model.model if hasattr(model, "patcher") else model.blocks


def test_every_published_name_is_registered():
    assert len(PUBLISHED) == 24
    assert {"formix_vit", "formix_xcit", *PUBLISHED} == set(REGISTERED)
    for name in REGISTERED:
        assert timm.is_model(name)
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.input_size == (3, 32, 32) if name in ACTIVATORS else (3, 224, 224)
        assert cfg.fixed_input_size
        assert not cfg.has_weights
        assert {f"{cfg.first_conv}.weight", f"{cfg.classifier}.weight"} <= set(create(name)[0].state_dict())
    with torch.device("meta"):  # without any argument, as timm's own tests make them
        assert timm.create_model("formix_vit").design == formix.design("softmax")
        assert timm.create_model("formix_xcit").design == formix.design("sima")


@pytest.mark.parametrize("name", NAMES)
def test_forward_backward_and_checkpointing(name):
    model, images = create(name, proj_drop_rate=0.0)
    model.train()
    logits = model(images)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    cotangent = torch.randn_like(logits)
    logits.backward(cotangent)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert all(g is not None for g in gradients.values())
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(images).backward(cotangent)
    for n, p in model.named_parameters():
        close(p.grad, gradients[n], 1e-4, n)


@pytest.mark.parametrize("name", NAMES)
def test_intermediates_and_features(name):
    model, images = create(name)
    model.eval()
    final, outputs = model.forward_intermediates(images)
    close(final, model.forward_features(images), 1e-6)
    assert [y.shape[:2] for y in outputs] == [(2, model.num_features)] * 2
    (last,) = model.forward_intermediates(images, indices=1, intermediates_only=True, output_fmt="NLC")
    close(last.transpose(1, 2).reshape(outputs[1].shape), outputs[1], 1e-6)
    ordered = model.forward_intermediates(images, indices=[1, 0, 1], intermediates_only=True)  # timm's: as they run
    assert len(ordered) == 2
    assert all(map(torch.equal, ordered, outputs))
    head = model.forward_head(model.forward_features(images))
    close(head, model(images), 1e-6)
    assert model.forward_head(final, pre_logits=True).shape == (2, model.num_features)
    features, _ = create(name, features_only=True, out_indices=(0, 1))
    given = features(images)
    assert [y.shape for y in given] == [y.shape for y in outputs]
    assert features.feature_info.channels() == [y.shape[1] for y in given]
    assert features.feature_info.reduction() == [images.shape[-1] / y.shape[-1] for y in given]
    model.prune_intermediate_layers([0])
    assert len(blocks(model)) == 1
    assert model.forward_intermediates(images, indices=[0], intermediates_only=True)[0].shape == outputs[0].shape
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
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
    assert config["architecture"] == small(name)[0]
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


def randomised(name: str):
    """With weights that all matter; some classifiers start at zero."""
    model, images = create(name)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.2)
    return model.eval(), images


@pytest.mark.parametrize(
    "name", [name if name in SCRIPTED else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_torchscript(name):
    """As timm's twins; the eager model stays as it was."""
    model, images = randomised(name)
    expected, parts = model(images), [type(m) for m in model.modules()]
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    close(scripted(images), expected, 1e-5)
    close(scripted(images[:1]), expected[:1], 1e-5)
    assert [type(m) for m in model.modules()] == parts
    assert torch.equal(model(images), expected)


def export(name):
    model, images = randomised(name)
    program = torch.export.export(model, (images,), strict=False)
    close(program.module()(images), model(images), 1e-5)


@pytest.mark.parametrize("name", ["sima_nano_12_p16", "activator_32_p4", "relu_vit_small_patch16_224"])
def test_export(name):
    export(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_export_of_all(name):
    export(name)


@pytest.mark.parametrize("name", NAMES)
def test_features_by_tracing(name):
    """Both extractors take any node of the graph; timm's has blocks and attentions as leaves, torchvision's has not."""
    model, images = randomised(name)
    head, expected = model.pretrained_cfg["classifier"], model(images)
    for extractor in (create_feature_extractor, feature_extraction.create_feature_extractor):
        close(extractor(model, [head]).eval()(images)[head], expected, 1e-5)


@pytest.mark.parametrize("name", ["sima_nano_12_p16", "activator_32_p4", "relu_vit_small_patch16_224"])
def test_half_precision_and_other_sizes(name):
    model, images = create(name)
    for dtype in (torch.bfloat16, torch.float16):
        assert model.eval().to(dtype)(images.to(dtype)).isfinite().all()
    if not name.startswith("relu"):
        assert model.float()(torch.randn(1, 3, 64, 32)).shape == (1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_compile(name):
    torch.compiler.reset()
    model, images = randomised(name)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images), 1e-4)


@pytest.mark.parametrize("name", [n for n in CLASSES if n != "ninformer_32_p4"])  # its token mixing has one size
def test_weights_at_another_image_size(name, tmp_path):
    """Position embeddings are resampled as timm does it, and nothing else changes."""
    model, images = create(name)
    formix.save(model, tmp_path)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    expected = model.state_dict()
    size = 2 * images.shape[-1]
    if "pos_embed" in expected:
        grid = [2 * n for n in model.patch_embed.grid_size]
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        expected["pos_embed"] = resample_abs_pos_embed(expected["pos_embed"], grid, num_prefix_tokens=prefix)
    architecture, arguments = small(name)
    arguments |= {} if model.design is None else {"design": model.design}
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "w.pth"), "num_classes": 10}}
    for loaded in (
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size),
        timm.create_model(architecture, **arguments | {"img_size": size}, **overlay),
        formix.create_model(tmp_path, img_size=size),
    ):
        state = loaded.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[k]) for k, tensor in state.items())
        assert loaded.eval()(torch.randn(1, 3, size, size)).shape == (1, 10)


@pytest.mark.parametrize("name", CLASSES)
def test_torch_func(name):
    """Gradients of the images and, one by one, of the weights, as autograd has them."""
    model, images = randomised(name)
    images.requires_grad_()
    (expected,) = torch.autograd.grad(model(images).square().sum(), images)
    close(torch.func.grad(lambda x: model(x).square().sum())(images), expected, 1e-4)

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    weights = {k: p.detach() for k, p in model.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images.detach())
    model(images).square().sum().backward()
    for k, p in model.named_parameters():
        if p.grad is not None:
            close(each[k].sum(0), p.grad, 1e-3, k)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="no_such_argument"):
        formix.create_model("sima_nano_12_p16", no_such_argument=1)
    with pytest.raises(ValueError, match="multiple of patch_size"):
        formix.create_model("activator_32_p4", img_size=30)
    with pytest.raises(ValueError, match="activation"):
        formix.create_model("relu_vit_small_patch16_224", activation="tanh")


@pytest.mark.parametrize("name", ["sima_nano_12_p16", "xcit_nano_12_p16_224", "activator_32_p4", "ninformer_32_p4"])
def test_numbers_that_no_model_has_are_named(name):
    design = "sima" if name.startswith("xcit") else None
    for argument, value in (("depth", 0), ("depth", -1), ("in_chans", 0), ("embed_dim", 0), ("num_classes", -1)):
        with pytest.raises(ValueError, match=f"{argument} is {value}; it must be a whole number"):
            formix.create_model(name, design, **{argument: value})
    with pytest.raises(ValueError, match="patch_size"):
        formix.create_model(name, design, patch_size=0)


def test_a_channel_of_zeros_stays_zero_in_torchscript_in_float16():
    model = formix.create_model("sima_nano_12_p16", "sima", depth=1, img_size=32, num_classes=4).eval()  # eps 1e-12
    attn = model.cls_attn_blocks[0].attn
    with torch.no_grad():
        attn.qkv.weight[0] = attn.qkv.bias[0] = 0  # the first channel of the queries
    expected, tokens = copy.deepcopy(attn), torch.randn(2, 5, 128)
    scripted = torch.jit.script(ScriptableClassAttention(attn.half()))
    close(scripted(tokens.half()), expected(tokens), 2e-3)
