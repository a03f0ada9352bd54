"""Activator, Uniform Activator and NiNformer: keys, counts, the official forward, and what it does not mix."""

import pytest
import straight as s
import timm
import torch
from oracles import close

import formix
from formix.benchmarks import count_flops
from formix.models.activator import vit_weights
from formix.models.image import load_official

NAMES = ["activator_32_p4", "activator_glu_32_p4", "uniform_activator_32_p4", "ninformer_32_p4"]
PARAMETERS = dict(zip(NAMES, (2_650_890, 1_599_242, 806_666, 2_652_170), strict=True))
PER_BLOCK = dict(zip(NAMES, (658_944, 396_032, 197_888, 659_264), strict=True))
MMAC = dict(zip(NAMES, (168.56, 101.45, 51.12, 218.89), strict=True))


def official_shapes(name: str, d: int = 256, f: int = 512, depth: int = 4, n: int = 64, patch: int = 4):
    """The official classifier's keys and shapes."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(key: str, out: int, into: int) -> None:
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (out, into), (out,)

    def norm(key: str, width: int) -> None:
        shapes[f"{key}.weight"] = shapes[f"{key}.bias"] = (width,)

    for i in range(depth):
        norm(f"model.{i}.norm", d)
        if name.startswith("ninformer"):
            mixer = f"model.{i}.mgu.Mixer"
            norm(f"{mixer}.token_mix.0", d)
            linear(f"{mixer}.token_mix.2.net.0", f, n)
            linear(f"{mixer}.token_mix.2.net.3", n, f)
            norm(f"{mixer}.channel_mix.0", d)
            linear(f"{mixer}.channel_mix.1.net.0", f, d)
            linear(f"{mixer}.channel_mix.1.net.3", d, f)
            linear(f"model.{i}.mgu.proj", d, d)
        else:
            inner = d if name.startswith("uniform") else f
            linear(f"model.{i}.actgu.proj_1", inner, d)
            linear(f"model.{i}.actgu.proj_2", inner, d)
            linear(f"model.{i}.actgu.proj_3", d, inner)
            if inner == f:
                norm(f"model.{i}.actgu.norm", f)
        if name in ("activator_32_p4", "ninformer_32_p4"):
            linear(f"model.{i}.ffn.net.0", f, d)
            linear(f"model.{i}.ffn.net.3", d, f)
    shapes["patcher.weight"], shapes["patcher.bias"] = (d, 3, patch, patch), (d,)
    linear("classifier", 10, d)
    return shapes


def feed_forward(state, key, x):
    return s.linear(state, f"{key}.3", s.gelu(s.linear(state, f"{key}.0", x)))


def official(name: str, state: s.State, images: torch.Tensor, *, depth: int = 4, patch: int = 4) -> torch.Tensor:
    """The official classifier in evaluation mode, step by step."""
    x = s.conv(state, "patcher", images, stride=patch).flatten(2).mT
    for i in range(depth):
        p = f"model.{i}"
        h = s.norm(state, f"{p}.norm", x, 1e-5)
        if name.startswith("ninformer"):
            m = f"{p}.mgu.Mixer"
            z = h + feed_forward(state, f"{m}.token_mix.2.net", s.norm(state, f"{m}.token_mix.0", h, 1e-5).mT).mT
            z = z + feed_forward(state, f"{m}.channel_mix.1.net", s.norm(state, f"{m}.channel_mix.0", z, 1e-5))
            x = x + s.linear(state, f"{p}.mgu.proj", h) * z
        else:
            u = s.gelu(s.linear(state, f"{p}.actgu.proj_1", h))
            v = s.linear(state, f"{p}.actgu.proj_2", h)
            if not name.startswith("uniform"):
                u, v = (s.norm(state, f"{p}.actgu.norm", a, 1e-5) for a in (u, v))
            x = x + s.linear(state, f"{p}.actgu.proj_3", u * v)
        if name in ("activator_32_p4", "ninformer_32_p4"):
            x = x + feed_forward(state, f"{p}.ffn.net", s.norm(state, f"{p}.norm", x, 1e-5))
    return s.linear(state, "classifier", x.mean(1))


@pytest.mark.parametrize("name", NAMES)
def test_official_keys_and_counts(name):
    model = timm.create_model(name)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == official_shapes(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert sum(p.numel() for p in model.model[0].parameters()) == PER_BLOCK[name]
    assert count_flops(model, torch.empty(1, 3, 32, 32)) / 2e6 == pytest.approx(MMAC[name], abs=0.005)


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_the_official_ones(name, scale):
    state = s.random_state(official_shapes(name), scale)
    model = formix.create_model(name).eval()
    s.compare(model, lambda w, x: official(name, w, x), state, torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_load_a_saved_state_dict(name, tmp_path):
    state = {k: v.float() for k, v in s.random_state(official_shapes(name)).items()}
    torch.save(state, tmp_path / "model.pth")
    model = timm.create_model(name)
    load_official(model, tmp_path / "model.pth")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES[:3])
def test_activator_mixes_no_tokens(name):
    """Its trunk commutes with a permutation of the tokens, its logits ignore one, and a token's output depends on
    that token alone."""
    model = timm.create_model(name).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)  # [B, 3, N, 4, 4]
    order = torch.randperm(64)
    shuffled = patches[:, :, order].unflatten(2, (8, 8)).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)
    close(model.forward_features(shuffled), model.forward_features(images)[:, order], 1e-12)
    close(model(shuffled), model(images), 1e-12)

    tokens = torch.randn(1, 64, 256, dtype=torch.float64, requires_grad=True)
    model.model(tokens)[0, 3].sum().backward()
    assert tokens.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [3]


def test_ninformer_mixes_tokens_and_has_one_size():
    model = timm.create_model("ninformer_32_p4").double().eval()
    tokens = torch.randn(1, 64, 256, dtype=torch.float64, requires_grad=True)
    model.model(tokens)[0, 3].sum().backward()
    assert (tokens.grad[0].abs().sum(-1) > 0).all()
    with pytest.raises(ValueError, match="built for 32 x 32"):
        model(torch.randn(1, 3, 40, 40, dtype=torch.float64))
    assert timm.create_model("activator_32_p4")(torch.randn(1, 3, 40, 24)).shape == (1, 10)


def test_norms_are_tied():
    """One outer norm and one inner norm per block; each gathers the gradients of both its uses."""
    model = timm.create_model("activator_32_p4").double().eval()
    block = model.model[0]
    x = torch.randn(2, 5, 256, dtype=torch.float64)
    first, second = ({k: v.clone().requires_grad_() for k, v in block.norm.state_dict().items()} for _ in range(2))
    unit = block.actgu(torch.nn.functional.layer_norm(x, (256,), first["weight"], first["bias"]))
    x1 = x + unit
    out = x1 + block.ffn(torch.nn.functional.layer_norm(x1, (256,), second["weight"], second["bias"]))
    cotangent = torch.randn_like(out)
    apart = torch.autograd.grad(out, [first["weight"], second["weight"]], cotangent)
    (tied,) = torch.autograd.grad(block(x), block.norm.weight, cotangent)
    close(tied, apart[0] + apart[1], 1e-12)


@pytest.mark.parametrize(
    ("name", "design"),
    [
        ("activator_32_p4", formix.design("activator", official=True)),  # the norms tied, as published
        ("activator_32_p4", formix.design("activator", inner_norm=True)),  # each norm by itself
        ("activator_glu_32_p4", formix.design("activator-glu", inner_norm=True)),
        ("uniform_activator_32_p4", formix.design("activator-glu", ratio=1.0)),
    ],
    ids=["tied", "untied", "glu", "uniform"],
)
def test_the_designs_in_a_vit_compute_the_published_trunk(name, design):
    published = timm.create_model(name).double().eval()
    published.load_state_dict(s.random_state(official_shapes(name)))
    model = formix.create_model(
        "vit_tiny_patch16_224", design=design, img_size=32, patch_size=4, embed_dim=256, depth=4, num_heads=4,
        mlp_ratio=2, num_classes=10, norm_layer=torch.nn.LayerNorm, class_token=False, pos_embed="none",
        global_pool="avg", fc_norm=False, final_norm=False,
        proj_drop_rate=0.5,
    ).double().eval()  # fmt: skip
    model.load_state_dict(vit_weights(published.state_dict(), model), strict=True)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    close(model(images), published(images), 1e-11)
    if design.official:  # then dropout, too, is where the authors have it
        dropped = []
        for each in (model.train(), published.train()):
            torch.manual_seed(0)
            dropped.append(each(images))
        close(*dropped, 1e-11)


def test_a_vit_of_another_function_is_refused():
    tiny = {"depth": 1, "embed_dim": 8}
    vit = tiny | {"img_size": 32, "patch_size": 4, "num_heads": 2}
    for name, design, lost in (
        ("activator_32_p4", "activator-glu(inner_norm=true)", "ffn.net.0.weight"),
        ("activator_32_p4", "activator", "actgu.norm.weight"),
        ("ninformer_32_p4", "activator", "mgu.Mixer.token_mix.0.weight"),
    ):
        state = timm.create_model(name, **tiny).state_dict()
        with pytest.raises(ValueError, match=f"model.0.{lost} has no place in this ViT"):
            vit_weights(state, formix.create_model("vit_tiny_patch16_224", design, **vit))


def test_dropout_only_where_the_authors_have_it():
    images = torch.randn(4, 3, 32, 32)
    for name, varies in zip(NAMES, (True, False, False, True), strict=True):
        model = timm.create_model(name).train()
        assert torch.equal(model(images), model(images)) is not varies, name
    model = timm.create_model("activator_32_p4")
    assert {m.p for m in model.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}


def test_the_published_design_is_fixed():
    assert formix.create_model("activator_32_p4").design.official
    with pytest.raises(ValueError, match="blocks are fixed"):
        formix.create_model("activator_32_p4", design="relu")
    with pytest.raises(ValueError, match="blocks are fixed"):
        formix.create_model("ninformer_32_p4", design="activator")
    with pytest.raises(ValueError, match="'avg' or ''"):
        formix.create_model("activator_32_p4", global_pool="token")


def test_uniform_units_have_no_width_of_their_own():
    with pytest.raises(ValueError, match="hidden_dim is 64; units of Uniform Activator are as wide as its tokens"):
        timm.create_model("uniform_activator_32_p4", hidden_dim=64)
    model = timm.create_model("uniform_activator_32_p4", embed_dim=64, hidden_dim=64)
    assert model.model[0].actgu.proj_1.out_features == 64
