"""SimA's released models: names, keys, counts, and the official forward written out once more."""

import argparse
import functools
import itertools
import logging
import math
from pathlib import Path

import pytest
import straight as s
import timm
import torch
from oracles import close

import formix
from formix.benchmarks import count_flops
from formix.models.image import load_official

# the published table: width C, depth, heads H, eta, tokens_norm
SIZES = {
    "sima_nano_12": (128, 12, 4, 1.0, False),
    "sima_tiny_12": (192, 12, 4, 1.0, True),
    "sima_small_12": (384, 12, 8, 1.0, True),
    "sima_tiny_24": (192, 24, 4, 1e-5, True),
    "sima_small_24": (384, 24, 8, 1e-5, True),
    "sima_medium_24": (512, 24, 8, 1e-5, True),
    "sima_large_24": (768, 24, 16, 1e-5, True),
}
NAMES = [f"{name}_p{patch}" for name in SIZES for patch in (16, 8)]
# parameters in millions and billions of multiplications at 224
COUNTS = {
    "sima_nano_12_p16": (3.05, 0.557),
    "sima_tiny_12_p16": (6.72, 1.245),
    "sima_small_12_p16": (26.25, 4.853),
    "sima_tiny_24_p16": (12.12, 2.336),
    "sima_small_24_p16": (47.67, 9.118),
    "sima_medium_24_p16": (84.40, 16.19),
    "sima_large_24_p16": (189.1, 36.02),
    "sima_small_12_p8": (26.21, 18.85),
}


def official_shapes(c: int, depth: int, patch: int, classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """The official state dict's keys and shapes."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, c)}

    def pair(name: str, out: int, *rest: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, *rest), (out,)

    def batch_norm(name: str, width: int) -> None:
        pair(name, width)
        shapes[f"{name}.running_mean"] = shapes[f"{name}.running_var"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    widths = [3, c // 8, c // 4, c // 2, c] if patch == 16 else [3, c // 4, c // 2, c]
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        shapes[f"patch_embed.proj.{2 * i}.0.weight"] = (after, before, 3, 3)
        batch_norm(f"patch_embed.proj.{2 * i}.1", after)
    for prefix, gammas, norms in [(f"blocks.{i}", 3, 3) for i in range(depth)] + [
        (f"cls_attn_blocks.{j}", 2, 2) for j in range(2)
    ]:
        for g in range(1, gammas + 1):
            shapes[f"{prefix}.gamma{g}"] = (c,)
        for n in range(1, norms + 1):
            pair(f"{prefix}.norm{n}", c)
        pair(f"{prefix}.attn.qkv", 3 * c, c)
        pair(f"{prefix}.attn.proj", c, c)
        pair(f"{prefix}.mlp.fc1", 4 * c, c)
        pair(f"{prefix}.mlp.fc2", c, 4 * c)
        if prefix.startswith("blocks"):
            pair(f"{prefix}.local_mp.conv1", c, 1, 3, 3)
            pair(f"{prefix}.local_mp.conv2", c, 1, 3, 3)
            batch_norm(f"{prefix}.local_mp.bn", c)
    pair("norm", c)
    pair("head", classes, c)
    pair("pos_embeder.token_projection", c, 64, 1, 1)
    return shapes


def position_encoding(state: s.State, height: int, width: int) -> torch.Tensor:
    """[1, C, H, W]; the waves are computed in float32, as the official code does."""
    y = torch.arange(1, height + 1, dtype=torch.float32)[:, None].expand(height, width)
    x = torch.arange(1, width + 1, dtype=torch.float32)[None, :].expand(height, width)
    y, x = (a / (last + 1e-6) * (2 * math.pi) for a, last in ((y, y[-1:, :]), (x, x[:, -1:])))
    channel = torch.arange(32, dtype=torch.float32)
    wavelength = 10000 ** (2 * torch.div(channel, 2, rounding_mode="floor") / 32)
    waves = []
    for position in (y, x):
        angle = position[..., None] / wavelength
        waves.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(2))
    features = torch.cat(waves, dim=-1).permute(2, 0, 1)[None]
    return s.conv(state, "pos_embeder.token_projection", features.to(state["cls_token"].dtype))


def official(state: s.State, images: torch.Tensor, *, depth: int, heads: int, tokens_norm: bool, training=False):
    """The official network, step by step."""
    stages = sorted({int(k.split(".")[2]) for k in state if k.startswith("patch_embed")})
    x = images
    for i in stages:
        x = s.conv(state, f"patch_embed.proj.{i}.0", x, stride=2, padding=1)
        x = s.batch_norm(state, f"patch_embed.proj.{i}.1", x, training)
        x = s.gelu(x) if i != stages[-1] else x
    b, c, h, w = x.shape
    x = (x + position_encoding(state, h, w)).flatten(2).mT

    def qkv(name, x):
        return (s.split_heads(part, heads) for part in s.linear(state, f"{name}.attn.qkv", x).chunk(3, dim=-1))

    def mlp(name, x):
        return s.linear(state, f"{name}.mlp.fc2", s.gelu(s.linear(state, f"{name}.mlp.fc1", x)))

    for i in range(depth):
        p = f"blocks.{i}"
        mixed = s.merge_heads(s.sima(*qkv(p, s.norm(state, f"{p}.norm1", x, 1e-6))))
        x = x + state[f"{p}.gamma1"] * s.linear(state, f"{p}.attn.proj", mixed)
        local = s.norm(state, f"{p}.norm3", x, 1e-6).mT.reshape(b, c, h, w)
        local = s.gelu(s.conv(state, f"{p}.local_mp.conv1", local, padding=1, groups=c))
        local = s.batch_norm(state, f"{p}.local_mp.bn", local, training)
        local = s.conv(state, f"{p}.local_mp.conv2", local, padding=1, groups=c).flatten(2).mT
        x = x + state[f"{p}.gamma3"] * local
        x = x + state[f"{p}.gamma2"] * mlp(p, s.norm(state, f"{p}.norm2", x, 1e-6))

    x = torch.cat([state["cls_token"].expand(b, -1, -1), x], dim=1)
    for j in range(2):
        p = f"cls_attn_blocks.{j}"
        normed = s.norm(state, f"{p}.norm1", x, 1e-6)
        q, k, v = qkv(p, normed)
        weights = (s.l1(q, 1e-6)[:, :, :1] * s.l1(k, 1e-6)).sum(-1)  # [B, H, N + 1]
        token = s.linear(state, f"{p}.attn.proj", s.merge_heads(weights[:, :, None] @ v))
        x = x + state[f"{p}.gamma1"] * torch.cat([token, normed[:, 1:]], dim=1)
        after = s.norm(state, f"{p}.norm2", x, 1e-6)
        x = after if tokens_norm else torch.cat([after[:, :1], x[:, 1:]], dim=1)
        x = x + torch.cat([state[f"{p}.gamma2"] * mlp(p, x[:, :1]), x[:, 1:]], dim=1)
    return s.linear(state, "head", s.norm(state, "norm", x, 1e-6)[:, 0])


@functools.cache
def meta_model(name: str):
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize("name", NAMES)
def test_official_keys_and_shapes(name):
    c, depth, heads, _eta, tokens_norm = SIZES[name.rsplit("_", 1)[0]]
    patch = int(name.rsplit("_p", 1)[1])
    model = meta_model(name)
    expected = official_shapes(c, depth, patch)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert len(expected) == {(12, 16): 371, (24, 16): 683, (12, 8): 365, (24, 8): 677}[depth, patch]
    assert {block.attn.num_heads for block in (*model.blocks, *model.cls_attn_blocks)} == {heads}
    assert {block.tokens_norm for block in model.cls_attn_blocks} == {tokens_norm}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_multiplications(name):
    model = meta_model(name)
    millions, billions = COUNTS[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1.1e-3)
    assert count_flops(model, torch.empty(1, 3, 224, 224, device="meta")) / 2e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "size", "scale", "training"),
    [
        ("sima_nano_12_p16", 48, 1.0, False),  # N = 9 tokens are fewer than D = 32 channels: (Q K^T) V
        ("sima_nano_12_p8", 64, 1.0, True),  # N = 64: Q (K^T V), nano's norm of the class token alone
        ("sima_tiny_12_p16", 64, 30.0, False),
        ("sima_tiny_12_p16", 112, 1.0, True),
        ("sima_tiny_24_p8", 32, 1e-3, False),
    ],
)
def test_logits_and_gradients_are_the_official_ones(name, size, scale, training):
    c, _, heads, _, tokens_norm = SIZES[name.rsplit("_", 1)[0]]
    depth, patch = 3, int(name.rsplit("_p", 1)[1])
    state = s.random_state(official_shapes(c, depth, patch, classes=7), scale)
    state["blocks.0.attn.qkv.weight"][:5] = 0  # channels of zeros, which stay zeros
    state["blocks.0.attn.qkv.bias"][:5] = 0
    model = timm.create_model(name, depth=depth, num_classes=7, img_size=size).train(training)

    def forward(weights, images):
        return official(weights, images, depth=depth, heads=heads, tokens_norm=tokens_norm, training=training)

    s.compare(model, forward, state, torch.randn(2, 3, size, size, dtype=torch.float64))


def test_whole_nano_model():
    c, depth, heads, _, tokens_norm = SIZES["sima_nano_12"]
    state = s.random_state(official_shapes(c, depth, 16))
    model = formix.create_model("sima_nano_12_p16").double().eval()
    model.load_state_dict(state, strict=True)
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        close(model(images), official(state, images, depth=depth, heads=heads, tokens_norm=tokens_norm), 1e-10)


def test_containers_and_refusals(tmp_path):
    model = timm.create_model("sima_nano_12_p16", depth=1)
    state = {k: v + 1 for k, v in model.state_dict().items()}
    container = {"model": state, "model_ema": model.state_dict(), "epoch": 3, "scaler": {}, "optimizer": {},
                 "args": argparse.Namespace(lr=5e-4)}  # fmt: skip
    torch.save(container, tmp_path / "checkpoint.pth")
    loaded = timm.create_model("sima_nano_12_p16", depth=1)
    load_official(loaded, tmp_path / "checkpoint.pth")
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    load_official(loaded, tmp_path / "checkpoint.pth", ema=True)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    load_official(loaded, {f"module.{k}": v for k, v in state.items()})
    with pytest.raises(ValueError, match="do not fit"):
        load_official(timm.create_model("sima_nano_12_p16", depth=2), container)
    for no_weights in ({"epoch": 3}, {0: torch.zeros(1)}):
        with pytest.raises(ValueError, match="neither a mapping"):
            load_official(loaded, no_weights)
    with pytest.raises(ValueError, match="no 'model_ema'"):
        load_official(loaded, state, ema=True)
    with pytest.raises(ValueError, match="is no file"):
        load_official(loaded, tmp_path / "none.pth")
    torch.save(container | {"args": argparse.Namespace(output=Path("x"))}, tmp_path / "objects.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "checkpoint.pth").read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes(b"no tensors")
    (tmp_path / "empty.pth").touch()
    for name in ("objects.pth", "cut.pth", "cut.safetensors", "empty.pth"):
        with pytest.raises(ValueError, match=f"{name} is damaged, or holds objects"):
            load_official(loaded, tmp_path / name)


def test_timm_s_own_ways_to_a_checkpoint(tmp_path):
    model = timm.create_model("sima_nano_12_p16", depth=1)
    torch.save({"model": model.state_dict(), "epoch": 3, "scaler": {}}, tmp_path / "sima.pth")
    xcit = timm.create_model("xcit_nano_12_p16_224", depth=1)
    torch.save({"model": xcit.state_dict()}, tmp_path / "xcit.pth")
    for source, name in ((model, "sima"), (xcit, "xcit")):
        by_path = timm.create_model("sima_nano_12_p16", depth=1, checkpoint_path=str(tmp_path / f"{name}.pth"))
        adapted = by_path.adapt_checkpoint(source.state_dict())
        assert all(torch.equal(v, adapted[k]) for k, v in by_path.state_dict().items())
        overlay = {"file": str(tmp_path / f"{name}.pth")}
        other_head = timm.create_model(
            "sima_nano_12_p16", depth=1, num_classes=7, pretrained=True, pretrained_cfg_overlay=overlay
        )
        assert torch.equal(other_head.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
        assert other_head.num_classes == 7


def test_the_official_pair_in_training():
    """The official code returns its logits twice in training mode; here only if asked, as of timm's distilled DeiT."""
    model, images = timm.create_model("sima_nano_12_p16", depth=1), torch.randn(2, 3, 32, 32)
    assert isinstance(model.train()(images), torch.Tensor)
    model.set_distilled_training(True)
    first, second = model(images)
    assert first is second
    assert isinstance(model.eval()(images), torch.Tensor)


@pytest.mark.parametrize("layout", ["official", "timm"])
def test_xcit_checkpoints_as_a_start(layout, caplog):
    source = timm.create_model("xcit_nano_12_p16_224", depth=2).state_dict()
    if layout == "official":
        shapes = official_shapes(128, 2, 16)
        shapes |= {f"blocks.{i}.attn.temperature": (4, 1, 1) for i in range(2)}
        source = {k: v.float() if v.is_floating_point() else v for k, v in s.random_state(shapes).items()}
    model = timm.create_model("sima_nano_12_p16", depth=2)
    with caplog.at_level(logging.WARNING, logger="formix"):
        load_official(model, {"model": source})
    assert "dropped the temperatures of 2 blocks" in caplog.text
    state = model.state_dict()
    assert torch.equal(state["blocks.1.attn.qkv.weight"], source["blocks.1.attn.qkv.weight"])
    if layout == "timm":
        assert torch.equal(state["cls_attn_blocks.0.attn.qkv.bias"][128:256], source["cls_attn_blocks.0.attn.k.bias"])
        name = "token_projection.weight"
        assert torch.equal(state[f"pos_embeder.{name}"], source[f"pos_embed.{name}"])


def test_class_block_doubles_patch_tokens_officially_and_not_otherwise():
    x = torch.randn(2, 10, 192, dtype=torch.float64)
    block = timm.create_model("sima_tiny_12_p16", depth=1).double().cls_attn_blocks[0]
    doubled = 2 * block.norm2(x + block.gamma1 * block.norm1(x))
    close(block(x)[:, 1:], doubled[:, 1:], 1e-12)
    clean = formix.create_model("xcit_tiny_12_p16_224", design="sima", depth=1).double().cls_attn_blocks[0]
    assert torch.equal(clean(x)[:, 1:], x[:, 1:])
    assert clean.attn.eps == 1e-12
    assert block.attn.eps == 1e-6


@pytest.mark.parametrize("name", timm.list_models("xcit_*"))
def test_every_xcit_name_of_timm_s(name):
    """The shapes are those of timm's model, but for the temperatures and the packed class attention."""
    with torch.device("meta"):
        theirs = timm.create_model(name, depth=1).state_dict()
        model = formix.create_model(name, design="sima", depth=1)
    theirs = model.adapt_checkpoint(dict(theirs))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models(["vit_*", "deit*"]))
def test_every_vit_and_deit_name_of_timm_s(name):
    """The shapes are those of timm's model, and SimA is in every attention."""
    one = {"depth": 1} | ({"num_kv_heads": 1} if "sapiens2" in name else {})
    with torch.device("meta"):
        model = formix.create_model(name, design="sima", **one)
        theirs = timm.create_model(name, **one).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in theirs.items()}
    assert {m.mixer.kind for m in model.modules() if hasattr(m, "mixer")} == {"sima"}


def test_an_xcit_that_timm_saves_comes_back_in_its_design(tmp_path):
    model = formix.create_model("xcit_nano_12_p16_224", "relu", depth=2, img_size=64, num_classes=5).eval()
    timm.models.save_for_hf(model, tmp_path)
    x = torch.randn(2, 3, 64, 64)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.design == formix.design("relu")
    close(loaded(x), model(x), 1e-6)


def test_initialisation_and_stochastic_depth():
    model = timm.create_model("sima_tiny_24_p16", drop_path_rate=0.05)
    assert {block.drop_path1.drop_prob for block in model.blocks} == {0.05}  # constant, not rising
    assert all(torch.equal(block.gamma3, torch.full((192,), 1e-5)) for block in model.blocks)
    weight = model.blocks[3].attn.qkv.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.cls_attn_blocks[1].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.blocks[3].attn.qkv.bias.any()
    assert model.no_weight_decay() == set()


def test_single_head_and_other_designs():
    model = formix.create_model("sima_nano_12_p16", num_heads=1, depth=2, img_size=32, num_classes=3).double().eval()
    assert (model.blocks[0].attn.head_dim, model.cls_attn_blocks[0].attn.head_dim) == (128, 128)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    close(model(images), official(model.state_dict(), images, depth=2, heads=1, tokens_norm=False), 1e-10)
    for design in ("sima(num_heads=1)", "softmax", "relu(qk_norm=true,gate=silu)"):
        other = formix.create_model("xcit_nano_12_p16_224", design=design, depth=2, img_size=32, num_classes=3)
        assert other.double()(images).isfinite().all()
    for design, words in (("activator", "gated unit"), ("sima+paf", "one layout"), ("skip", "no skip wiring")):
        with pytest.raises(ValueError, match=words):
            formix.create_model("xcit_nano_12_p16_224", design=design, depth=2)
    with pytest.raises(ValueError, match="cross-covariance"):
        formix.create_model("xcit_nano_12_p16_224")
    with pytest.raises(ValueError, match="No weights"):
        formix.create_model("sima_nano_12_p16", pretrained=True)
