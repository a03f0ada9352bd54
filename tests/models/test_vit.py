"""Vision Transformers on timm's trunk: timm's own numbers and methods, and every design in their place."""

import copy
from functools import partial

import pytest
import timm
import torch
from oracles import close
from timm.layers import Mlp
from timm.models import save_for_hf
from timm.models._features import FeatureGetterNet
from torch import nn

import formix
from formix.design import Layout, Softmax
from formix.models import own_blocks

SMALL = {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
NAMES = {  # name -> what differs from SMALL
    "vit_tiny_patch16_224": {},
    "vit_small_patch14_dinov2": {"img_size": 28},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch16_clip_224": {},
    "vit_medium_patch16_gap_240": {},
    "vit_base_patch16_224_miil": {},
}


def timms(name, **kwargs):
    model = timm.create_model(name, **(SMALL | NAMES.get(name, {}) | kwargs))
    for p in model.parameters():
        nn.init.normal_(p, mean=0.02, std=0.1)
    return model.eval()


def ours(name="vit_tiny_patch16_224", design="softmax", **kwargs):
    return formix.create_model(name, design, **(SMALL | NAMES.get(name, {}) | kwargs)).eval()


def pair(name, **kwargs):
    theirs = timms(name, **kwargs)
    model = ours(name, **kwargs)
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model, theirs


def image_for(model, n=2):
    return torch.randn(n, model.in_chans if hasattr(model, "in_chans") else 3, *model.patch_embed.img_size)


# ------------------------------------------------------------------------------------------------ softmax is timm's


@pytest.mark.parametrize("name", NAMES)
def test_softmax_is_timm_s_model(name):
    model, theirs = pair(name)
    x = image_for(theirs)
    with torch.no_grad():
        close(model(x), theirs(x), 1e-6)
        close(model.forward_features(x), theirs.forward_features(x), 1e-6)
        close(model.forward_head(theirs.forward_features(x), pre_logits=True),
              theirs.forward_head(theirs.forward_features(x), pre_logits=True), 1e-6)  # fmt: skip


def test_softmax_gradients_are_timm_s():
    model, theirs = pair("vit_small_patch14_dinov2")
    x = image_for(theirs)
    for m in (model, theirs):
        m(x).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        close(p.grad, expected[name].grad, 1e-5, f"gradient of {name}", floor=0.1)


ARGUMENTS = {
    "img_size": {"img_size": 48},
    "img_size_pair": {"img_size": (32, 48)},
    "patch_size": {"patch_size": 8},
    "in_chans": {"in_chans": 1},
    "num_classes": {"num_classes": 17},
    "no_head": {"num_classes": 0},
    "average": {"global_pool": "avg"},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 2},
    "mlp_ratio": {"mlp_ratio": 2.0},
    "layer_scale": {"init_values": 0.1},
    "qk_norm": {"qk_norm": True},
    "no_qkv_bias": {"qkv_bias": False},
    "dynamic_size": {"dynamic_img_size": True},
    "activation": {"act_layer": "relu"},
    "final_norm": {"final_norm": False, "fc_norm": True, "global_pool": "avg"},
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_pass_through(case, tmp_path):
    """The same logits as timm's with these arguments, and the same again after save and load."""
    model, theirs = pair("vit_tiny_patch16_224", **ARGUMENTS[case])
    size = theirs.patch_embed.img_size
    if case == "dynamic_size":
        size = (48, 64)
    x = torch.randn(2, ARGUMENTS[case].get("in_chans", 3), *size)
    with torch.no_grad():
        close(model(x), theirs(x), 1e-6)
        formix.save(model, tmp_path)
        assert torch.equal(formix.load(tmp_path)(x), model(x))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_medium_patch16_gap_240"]
)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"indices": 2},
        {"indices": [0, 2], "norm": True},
        {"indices": [1], "stop_early": True, "intermediates_only": True},
        {"return_prefix_tokens": True, "output_fmt": "NLC"},
        {"output_dict": True},
        {"output_dict": True, "return_prefix_tokens": True, "intermediates_only": True},
        {"indices": [-1, 0], "intermediates_only": True},
    ],
    ids=str,
)
def test_forward_intermediates_is_timm_s(name, arguments):
    model, theirs = pair(name)
    x = image_for(theirs)
    with torch.no_grad():
        got, want = (list(leaves(m.forward_intermediates(x, **arguments))) for m in (model, theirs))
    assert len(got) == len(want) > 0
    for (place, a), (other, b) in zip(got, want, strict=True):
        assert place == other
        close(a, b, 1e-6, place)


def leaves(value, place=""):
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from leaves(part, f"{place}[{i}]")
    elif value is not None:
        yield place, value


def test_methods_are_timm_s():
    model, theirs = pair("vit_small_patch14_reg4_dinov2")
    x = image_for(theirs)
    with torch.no_grad():
        for arguments in (
            {"n": 2},
            {"n": [0, 2], "reshape": True, "norm": True},
            {"n": 1, "return_prefix_tokens": True},
        ):
            got, want = (list(leaves(m.get_intermediate_layers(x, **arguments))) for m in (model, theirs))
            assert len(got) == len(want)
            for (_, a), (_, b) in zip(got, want, strict=True):
                close(a, b, 1e-6)
    assert model.no_weight_decay() == theirs.no_weight_decay()
    assert model.group_matcher() == theirs.group_matcher()
    assert model.group_matcher(coarse=True) == theirs.group_matcher(coarse=True)
    assert model.get_classifier() is model.head
    assert (model.num_features, model.embed_dim, model.num_prefix_tokens) == (48, 48, 5)
    with pytest.raises(ValueError, match="output_fmt is 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_masks_are_timm_s():
    model, theirs = pair("vit_tiny_patch16_224")
    x, mask = image_for(theirs), torch.rand(5, 5) > 0.3
    mask[:, 0] = True
    with torch.no_grad():
        close(model(x, attn_mask=mask), theirs(x, attn_mask=mask), 1e-6)
        features = (m.forward_features(x, attn_mask=mask, is_causal=False) for m in (model, theirs))
        close(*features, 1e-6)


@pytest.mark.parametrize("prune_norm", [False, True])
def test_pruning_is_timm_s(prune_norm):
    model, theirs = pair("vit_tiny_patch16_224")
    x = image_for(theirs)
    taken = [m.prune_intermediate_layers([0, 1], prune_norm=prune_norm) for m in (model, theirs)]
    assert taken[0] == taken[1]
    with torch.no_grad():
        close(model(x), theirs(x), 1e-6)


def test_reset_classifier(tmp_path):
    model, theirs = pair("vit_tiny_patch16_224")
    for m in (model, theirs):
        m.reset_classifier(9, "avg")
    theirs.head.load_state_dict(model.head.state_dict())
    x = image_for(theirs)
    with torch.no_grad():
        close(model(x), theirs(x), 1e-6)
        formix.save(model, tmp_path)
        loaded = formix.load(tmp_path)
        assert loaded.num_classes == 9
        assert torch.equal(loaded(x), model(x))


def test_timm_s_feature_wrapper():
    """timm wraps the trunk for features; the wrapper's features are the trunk's intermediates."""
    model = ours(design="relu")
    x = image_for(model)
    wrapped = FeatureGetterNet(copy.deepcopy(model), out_indices=(0, 2), prune=False)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        for got, want in zip(wrapped(x), expected, strict=True):
            assert torch.equal(got, want)


# ---------------------------------------------------------------------------------------------------- every design


@pytest.mark.parametrize("design", [*formix.list_designs(), "relu+paf+skip", "sima+parallel"])
def test_every_design(design, tmp_path):
    """Finite logits and gradients for every parameter, checkpointing equal, save and load equal."""
    model = ours(design=design).train()
    x = image_for(model)
    model(x).square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    unused = {"cls_token"} if design.startswith("activator") else set()  # nothing mixes it with the patches
    assert {n for n, g in gradients.items() if g is None or not g.isfinite().all()} == set()
    assert {n for n, g in gradients.items() if not g.any()} <= unused | {
        n for n in gradients if "k_norm" in n or n == "cls_token"
    }

    other = copy.deepcopy(model)
    other.zero_grad()
    other.set_grad_checkpointing()
    other(x).square().sum().backward()
    for name, p in other.named_parameters():
        close(p.grad, gradients[name], 1e-5, f"gradient of {name}", floor=0.1)

    model.eval()
    formix.save(model, tmp_path)
    loaded = formix.load(tmp_path)
    assert not loaded.training
    assert loaded.design == formix.design(design)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_designs_change_the_logits():
    """Same weights, another design: no design comes back as softmax."""
    softmax = ours()
    x, outputs = image_for(softmax), {}
    with torch.no_grad():
        for design in ("softmax", "relu", "sima", "skip", "relu(length_exponent=0.5)", "skip(heads=1)"):
            model = ours(design=design)
            model.load_state_dict(softmax.state_dict(), strict=True)
            outputs[design] = model(x)
    for a in outputs:
        for b in outputs:
            assert torch.allclose(outputs[a], outputs[b], atol=1e-7) is (a == b), (a, b)


def test_hybrid_layers():
    model = ours(design=formix.design("relu", layers={-1: Softmax(), 0: Layout(ffn=False)}))
    assert [b.layer_design.mixer.kind for b in model.blocks] == ["pointwise", "pointwise", "softmax"]
    assert model.blocks[0].mlp is None
    assert model(image_for(model)).shape == (2, 5)


def test_trunk_arguments_reach_the_blocks():
    model = ours(design="relu", drop_path_rate=0.3, proj_drop_rate=0.1, attn_drop_rate=0.2, init_values=0.5)
    assert [getattr(b.drop_path1, "drop_prob", 0) for b in model.blocks] == pytest.approx([0, 0.15, 0.3])
    assert all(b.attn.proj_drop.p == 0.1 and b.attn.attn_drop.p == 0.2 for b in model.blocks)
    assert all(torch.equal(b.ls1.gamma, torch.full((48,), 0.5)) for b in model.blocks)
    assert all(type(b.mlp) is Mlp for b in model.blocks)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_relpos_small_patch16_224"])
def test_checkpoint_path_reads_every_weight(name, tmp_path):
    """Of blocks with parts of the design's own too; what was loaded needs the file no more."""
    size, path = {"img_size": 32, "depth": 2, "num_classes": 5}, tmp_path / "weights.pth"
    model = formix.create_model(name, "relu(gate=silu)", **size).eval()
    torch.save(model.state_dict(), path)
    again = formix.create_model(name, "relu(gate=silu)", checkpoint_path=str(path), **size).eval()
    stock = tmp_path / "stock.pth"
    torch.save(timm.create_model(name, **size).state_dict(), stock)
    with pytest.raises(RuntimeError, match="gate"):  # as timm's: no weight stays random
        formix.create_model(name, "relu(gate=silu)", checkpoint_path=str(stock), **size)
    formix.save(again, tmp_path / "saved")
    path.unlink()
    x = image_for(model)
    close(again(x), model(x), 1e-6)
    close(formix.load(tmp_path / "saved").eval()(x), model(x), 1e-6)


@pytest.mark.parametrize(
    "make", [formix.create_model, partial(timm.create_model, "formix_vit")], ids=["formix", "timm"]
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_relpos_small_patch16_224"])
def test_what_timm_saves_comes_back_in_its_design(make, name, tmp_path):
    """`save_for_hf`, which `push_to_hf_hub` calls: never as the softmax model."""
    named = {"name": name} if make is formix.create_model else {"base": name}
    model = make(**named, design="relu", img_size=32, depth=2, init_values=1.0).eval()
    model.reset_classifier(5)
    save_for_hf(model, tmp_path, safe_serialization="both")
    x = image_for(model)
    close(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x), 1e-6)
    close(formix.load(tmp_path)(x), model(x), 1e-6)


def test_same_seed_same_weights_and_initialisation_is_timm_s():
    """Weights have the spread that timm gives them."""
    torch.manual_seed(3)
    first = ours(design="relu")
    torch.manual_seed(3)
    second = ours(design="relu")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    wide = {"img_size": 32, "depth": 2, "num_classes": 5}
    theirs = timm.create_model("vit_tiny_patch16_224", **wide).state_dict()
    for name, weight in formix.create_model("vit_tiny_patch16_224", "relu", **wide).state_dict().items():
        if weight.numel() > 1000:
            assert weight.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name


def test_activator_pools_the_tokens(caplog):
    model = ours(design="activator")
    assert model.global_pool == "avg"
    assert "pools by 'avg'" in caplog.text
    x = image_for(model)
    assert not torch.equal(model(x)[0], model(x)[1])
    with pytest.raises(ValueError, match="global_pool is 'token', but this design mixes no tokens"):
        ours(design="activator", global_pool="token")
    with pytest.raises(ValueError, match="pool by 'avg' instead"):
        ours(design="activator", global_pool="avg").reset_classifier(3, "token")
    with pytest.raises(ValueError, match=r"deit_tiny_distilled.*mixes no tokens"):
        ours("deit_tiny_distilled_patch16_224", design="activator")
    hybrid = ours(design=formix.design("activator", layers={1: Softmax()}))
    assert hybrid.global_pool == "token"


@pytest.mark.parametrize("design", ["softmax", "relu", "sima", "activator", "paf", "skip"])
def test_export(design):
    model = ours(design=design, depth=2)
    x = image_for(model)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        close(program.module()(x), model(x), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("design", formix.list_designs())
def test_compile(design):
    torch.compiler.reset()
    model = ours(design=design)
    x = image_for(model)
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True)(x), model(x), 1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("design", formix.list_designs())
def test_trace(design):
    model = ours(design=design)
    traced = torch.jit.trace(model, image_for(model))
    x = image_for(model, 3)
    close(traced(x), model(x), 1e-5)


@pytest.mark.parametrize("design", [*formix.list_designs(), "relu(gate=silu,qk_norm=true)+skip"])
def test_symbolic_trace(design):
    model = ours(design=design).eval()
    x = image_for(model, 3)
    close(torch.fx.symbolic_trace(model)(x), model(x), 1e-5)


# ---------------------------------------------------------------------------------------------------------- refused

REFUSED = {
    "unknown_name": (("vit_enormous_patch16_224", "relu"), {}, "vit_enormous"),
    "unknown_design": (("vit_tiny_patch16_224", "rellu"), {}, "'rellu' is no design"),
    "resnet": (("resnet18", "relu"), {}, "'resnet18' is a ResNet; formix knows"),
    "swin": (("swin_tiny_patch4_window7_224", "relu"), {}, "is a SwinTransformer"),
    "beit": (("beit_base_patch16_224", "relu"), {}, "is a Beit"),
    "unknown_argument": (("vit_tiny_patch16_224", "relu"), {"image_size": 32}, "image_size"),
    "block_fn": (("vit_tiny_patch16_224", "relu"), {"block_fn": nn.Identity}, "leave them out"),
    "attn_layer": (("vit_tiny_patch16_224", "relu"), {"attn_layer": "diff"}, "leave them out"),
    "layer_number": (("vit_tiny_patch16_224", formix.design("relu", layers={12: Softmax()})), {}, "names layer 12"),
    "distance": (("vit_tiny_patch16_224", "skip(source=distance(12))"), {}, "distance must be 1 to 11"),
    "heads": (("vit_tiny_patch16_224", "skip(heads=4)"), {}, "heads is 4, but the model has 3"),
    "sima_heads": (("vit_tiny_patch16_224", "sima(num_heads=5)"), {}, "num_heads is 5; it must divide"),
    "patch_size": (("vit_tiny_patch16_224", "relu"), {"patch_size": 0}, "patch_size"),
    "img_size": (("vit_tiny_patch16_224", "relu"), {"img_size": "big"}, "img_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    arguments, options, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        formix.create_model(*arguments, **options)


def test_unknown_blocks_are_refused(monkeypatch):
    monkeypatch.delitem(own_blocks._KINDS, "ParallelThingsBlock")
    with pytest.raises(ValueError, match=r"has blocks of its own \(ParallelThingsBlock\)"):
        formix.create_model("vit_small_patch16_18x2_224", "relu", depth=1)
