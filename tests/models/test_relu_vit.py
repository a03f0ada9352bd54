"""ReLU ViTs against big_vision's ViT written out from its parameter tree, and the tree itself both ways."""

import numpy as np
import pytest
import straight as s
import timm
import torch
from oracles import H, close

import formix
from formix.models import big_vision
from formix.ops import pointwise_attention

# width, depth, MLP, heads; tokens with mean pooling at 224
SIZES = {
    "relu_vit_small_patch32_224": (384, 12, 1536, 6, 49),
    "relu_vit_small_patch16_224": (384, 12, 1536, 6, 196),
    "relu_vit_small_patch8_224": (384, 12, 1536, 6, 784),
    "relu_vit_base_patch32_224": (768, 12, 3072, 12, 49),
    "relu_vit_base_patch16_224": (768, 12, 3072, 12, 196),
    "relu_vit_large_patch16_224": (1024, 24, 4096, 16, 196),
}
ATTENTION = "MultiHeadDotProductAttention_0"
FIGURE_2 = ("relu", "relu2", "gelu", "softplus", "identity", "relu6", "sigmoid")


def tree_shapes(
    width: int, depth: int, mlp: int, heads: int, tokens: int, *, patch: int = 16, classes: int = 1000, token=False,
    rep=False, qk_norm=True, gate=False, probe=False,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """big_vision's names and shapes."""
    d = width // heads
    shapes = {"embedding/kernel": (patch, patch, 3, width), "embedding/bias": (width,)}
    shapes["pos_embedding"] = (1, tokens, width)
    if token:
        shapes["cls"] = (1, 1, width)
    for i in range(depth):
        p = f"Transformer/encoderblock_{i}"
        for n in (0, 1):
            shapes[f"{p}/LayerNorm_{n}/scale"] = shapes[f"{p}/LayerNorm_{n}/bias"] = (width,)
        for part in ("query", "key", "value", *(("gate",) if gate else ())):
            shapes[f"{p}/{ATTENTION}/{part}/kernel"] = (width, heads, d)
            shapes[f"{p}/{ATTENTION}/{part}/bias"] = (heads, d)
        if qk_norm:
            shapes[f"{p}/{ATTENTION}/query_ln/scale"] = shapes[f"{p}/{ATTENTION}/key_ln/scale"] = (d,)
        shapes[f"{p}/{ATTENTION}/out/kernel"], shapes[f"{p}/{ATTENTION}/out/bias"] = (heads, d, width), (width,)
        shapes[f"{p}/MlpBlock_0/Dense_0/kernel"], shapes[f"{p}/MlpBlock_0/Dense_0/bias"] = (width, mlp), (mlp,)
        shapes[f"{p}/MlpBlock_0/Dense_1/kernel"], shapes[f"{p}/MlpBlock_0/Dense_1/bias"] = (mlp, width), (width,)
    shapes["Transformer/encoder_norm/scale"] = shapes["Transformer/encoder_norm/bias"] = (width,)
    if probe:
        p = "MAPHead_0"
        shapes[f"{p}/probe"], shapes[f"{p}/{ATTENTION}/out/kernel"] = (1, 1, width), (heads, d, width)
        for part in ("query", "key", "value"):
            shapes[f"{p}/{ATTENTION}/{part}/kernel"] = (width, heads, d)
            shapes[f"{p}/{ATTENTION}/{part}/bias"] = (heads, d)
        for n in (f"{ATTENTION}/out/bias", "LayerNorm_0/scale", "LayerNorm_0/bias", "MlpBlock_0/Dense_1/bias"):
            shapes[f"{p}/{n}"] = (width,)
        shapes[f"{p}/MlpBlock_0/Dense_0/kernel"], shapes[f"{p}/MlpBlock_0/Dense_0/bias"] = (width, mlp), (mlp,)
        shapes[f"{p}/MlpBlock_0/Dense_1/kernel"] = (mlp, width)
    if rep:
        shapes["pre_logits/kernel"], shapes["pre_logits/bias"] = (width, width), (width,)
    shapes["head/kernel"], shapes["head/bias"] = (width, classes), (classes,)
    return shapes


def random_tree(shapes, scale: float = 1.0) -> dict[str, np.ndarray]:
    fan = {k: np.prod(v[:-1]) if k.endswith("kernel") else 1 for k, v in shapes.items()}
    return {k: torch.randn(v, dtype=torch.float64).numpy() * scale * fan[k] ** -0.5 for k, v in shapes.items()}


def layer_norm(t, name, x):
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * t[f"{name}/scale"]
    return y + t[f"{name}/bias"] if f"{name}/bias" in t else y


def flax_vit(t, images, *, h="relu", exponent=1.0, depth=2, gate=None):
    """big_vision's ViT on its own parameter tree; h None is softmax. `images` [B, 3, H, W]."""
    patch = len(t["embedding/kernel"])
    x = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, h, w, P, P]
    x = torch.einsum("bcijpq,pqcd->bijd", x, t["embedding/kernel"]).flatten(1, 2) + t["embedding/bias"]
    x = x + t["pos_embedding"]
    if "cls" in t:
        x = torch.cat([t["cls"].expand(len(x), -1, -1), x], dim=1)
    for i in range(depth):
        p, a = f"Transformer/encoderblock_{i}", f"Transformer/encoderblock_{i}/{ATTENTION}"
        y = layer_norm(t, f"{p}/LayerNorm_0", x)
        q, k, v = (
            torch.einsum("bnc,chd->bnhd", y, t[f"{a}/{part}/kernel"]) + t[f"{a}/{part}/bias"]
            for part in ("query", "key", "value")
        )
        if f"{a}/query_ln/scale" in t:
            q, k = layer_norm(t, f"{a}/query_ln", q), layer_norm(t, f"{a}/key_ln", k)
        scores = torch.einsum("bqhd,bkhd->bhqk", q / q.shape[-1] ** 0.5, k)
        weights = scores.softmax(-1) if h is None else H[h](scores) * x.shape[1] ** -exponent
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        if gate is not None:
            projected = torch.einsum("bnc,chd->bnhd", y, t[f"{a}/gate/kernel"]) + t[f"{a}/gate/bias"]
            mixed = mixed * gate(projected)
        x = x + torch.einsum("bnhd,hdc->bnc", mixed, t[f"{a}/out/kernel"]) + t[f"{a}/out/bias"]
        y = layer_norm(t, f"{p}/LayerNorm_1", x)
        y = s.gelu_tanh(y @ t[f"{p}/MlpBlock_0/Dense_0/kernel"] + t[f"{p}/MlpBlock_0/Dense_0/bias"])
        x = x + y @ t[f"{p}/MlpBlock_0/Dense_1/kernel"] + t[f"{p}/MlpBlock_0/Dense_1/bias"]
    x = layer_norm(t, "Transformer/encoder_norm", x)
    x = map_head(t, x) if "MAPHead_0/probe" in t else x[:, 0] if "cls" in t else x.mean(1)
    if "pre_logits/kernel" in t:
        x = torch.tanh(x @ t["pre_logits/kernel"] + t["pre_logits/bias"])
    return x @ t["head/kernel"] + t["head/bias"]


def map_head(t, x):
    """Softmax attention of one learned query over all tokens, then an MLP: [B, N, C] -> [B, C]."""
    a = f"MAPHead_0/{ATTENTION}"
    q = torch.einsum("c,chd->hd", t["MAPHead_0/probe"][0, 0], t[f"{a}/query/kernel"]) + t[f"{a}/query/bias"]
    k, v = (
        torch.einsum("bnc,chd->bnhd", x, t[f"{a}/{part}/kernel"]) + t[f"{a}/{part}/bias"] for part in ("key", "value")
    )
    weights = torch.einsum("hd,bnhd->bhn", q / q.shape[-1] ** 0.5, k).softmax(-1)
    x = torch.einsum("bhn,bnhd,hdc->bc", weights, v, t[f"{a}/out/kernel"]) + t[f"{a}/out/bias"]
    y = layer_norm(t, "MAPHead_0/LayerNorm_0", x)
    p = "MAPHead_0/MlpBlock_0"
    y = s.gelu_tanh(y @ t[f"{p}/Dense_0/kernel"] + t[f"{p}/Dense_0/bias"])
    return x + y @ t[f"{p}/Dense_1/kernel"] + t[f"{p}/Dense_1/bias"]


def torch_tree(tree):
    return {k: torch.from_numpy(np.array(v)).requires_grad_() for k, v in tree.items()}


SMALL = {"depth": 2, "img_size": 48, "num_classes": 5, "embed_dim": 96}


def small(name="relu_vit_small_patch16_224", **arguments):
    """The named model at 48 pixels with 2 layers of a quarter of its width."""
    return timm.create_model(name, **SMALL | arguments).double().eval()


def check(model, tree, **options):
    """Equal logits and equal gradients, these brought into the tree's layout."""
    big_vision.load_npz(model, tree)
    assert next(model.parameters()).dtype == torch.float64
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    t = torch_tree(tree)
    expected, actual = flax_vit(t, images, **options), model(images)
    close(actual, expected, 1e-10)
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    actual.backward(cotangent)
    gradients = big_vision.from_tree({k: v.grad.numpy() for k, v in t.items()}, model)
    for name, parameter in model.named_parameters():
        close(parameter.grad, gradients[name], 1e-10, f"gradient of {name}")


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    width, depth, mlp, heads, tokens = SIZES[name]
    patch = int(name.split("patch")[1].split("_")[0])
    with torch.device("meta"):
        model = timm.create_model(name)
    shapes = tree_shapes(width, depth, mlp, heads, tokens, patch=patch)
    assert sum(p.numel() for p in model.parameters()) == sum(int(np.prod(v)) for v in shapes.values())
    assert (model.blocks[0].attn.num_heads, model.pos_embed.shape[1], len(model.blocks)) == (heads, tokens, depth)
    assert model.blocks[0].attn.mixer == formix.design("relu", qk_norm=True).mixer
    with torch.device("meta"):
        token = timm.create_model(name, global_pool="token", rep_size=True)
    shapes = tree_shapes(width, depth, mlp, heads, tokens, patch=patch, token=True, rep=True)
    assert sum(p.numel() for p in token.parameters()) == sum(int(np.prod(v)) for v in shapes.values())
    assert token.num_prefix_tokens == 1


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("h", FIGURE_2)
def test_every_function_and_exponent_of_figure_2(h, exponent):
    tree = random_tree(tree_shapes(96, 2, 384, 6, 9, classes=5))
    check(small(activation=h, length_exponent=exponent), tree, h=h, exponent=exponent)


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize(
    ("model", "shapes", "forward"),
    [
        ({}, {}, {}),
        ({"qk_norm": False}, {"qk_norm": False}, {}),
        ({"global_pool": "token", "rep_size": True}, {"token": True, "rep": True}, {}),
        ({"gate": "identity"}, {"gate": True}, {"gate": lambda g: g}),
        ({"gate": "silu"}, {"gate": True}, {"gate": lambda g: g * torch.sigmoid(g)}),
        ({"design": "softmax"}, {"qk_norm": False}, {"h": None}),
        ({"design": "softmax", "qk_norm": True}, {}, {"h": None}),
    ],
    ids=["gap", "no qk-norm", "token", "gate", "silu gate", "softmax", "softmax qk-norm"],
)
def test_logits_and_gradients_are_big_visions(model, shapes, forward, scale):
    tree = random_tree(tree_shapes(96, 2, 384, 6, 9, classes=5, **shapes), scale)
    check(small(**model), tree, **forward)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_a_tree_from_a_file_and_back(tmp_path, dtype):
    tree = {k: v.astype(dtype) for k, v in random_tree(tree_shapes(96, 2, 384, 6, 9, classes=5)).items()}
    model = small()
    for scan in (False, True):
        big_vision.load_npz(model, tree)
        big_vision.save_npz(model, tmp_path / "model.npz", scan=scan)
        with np.load(tmp_path / "model.npz") as file:
            names = set(file.files)
            if not scan:
                assert names == set(tree)
                assert all(np.array_equal(file[k], tree[k]) for k in tree)
            else:
                kernel = file[f"Transformer/encoderblock/{ATTENTION}/query/kernel"]
                assert kernel.shape == (2, 96, 6, 16)
        other = small()
        big_vision.load_npz(other, tmp_path / "model.npz")
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


def test_older_names_prefixes_and_bfloat16():
    tree = random_tree(tree_shapes(96, 2, 384, 6, 9, classes=5, token=True, qk_norm=False))
    model = small(design="softmax", global_pool="token")
    big_vision.load_npz(model, tree)
    expected = model.state_dict()
    older = {}
    for name, array in tree.items():
        name = name.replace("LayerNorm_1", "LayerNorm_2").replace("MlpBlock_0", "MlpBlock_3")
        name = name.replace(ATTENTION, "MultiHeadDotProductAttention_1")
        older[name] = array
    older["Transformer/posembed_input/pos_embedding"] = older.pop("pos_embedding")
    for form in (older, {f"params/{k}": v for k, v in older.items()} | {"opt/0/count": np.zeros(())}):
        loaded = small(design="softmax", global_pool="token")
        big_vision.load_npz(loaded, form)
        assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    bias = torch.randn(5).bfloat16()
    tree["head/bias"] = bias.view(torch.int16).numpy().view(np.dtype("V2"))
    big_vision.load_npz(loaded, tree)
    assert torch.equal(loaded.head.bias.detach(), bias.double())


@pytest.mark.parametrize("scale", [1.0, 4.0])  # beyond, its softmax chooses one token and has no gradient
def test_probe_that_pools(tmp_path, scale):
    """Today's file and back, and the older names, whose probe stood outside of all modules."""
    for model, shapes, options in (
        ({}, {}, {}),
        ({"rep_size": True, "design": "softmax"}, {"rep": True, "qk_norm": False}, {"h": None}),
    ):
        model = small(global_pool="map", **model)
        tree = random_tree(tree_shapes(96, 2, 384, 6, 9, classes=5, probe=True, **shapes), scale)
        check(model, tree, **options)
        big_vision.load_npz(model, {name.removeprefix("MAPHead_0/"): array for name, array in tree.items()})
        big_vision.save_npz(model, tmp_path / "model.npz")
        with np.load(tmp_path / "model.npz") as file:
            assert set(file.files) == set(tree)
            assert all(np.array_equal(file[k], tree[k]) for k in tree)


def test_what_timm_saves_comes_back(tmp_path):
    model = timm.create_model("relu_vit_small_patch16_224", rep_size=True, **SMALL | {"depth": 1}).eval()
    torch.nn.init.normal_(model.head.weight)
    timm.models.save_for_hf(model, tmp_path)
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    close(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x), 1e-6)


def test_timm_s_checkpoint_path_reads_every_weight(tmp_path):
    """timm hands npz files to the model; its own reader would leave out the norms of queries and keys and the gate."""
    size = SMALL | {"depth": 1}
    model = small(gate="silu", depth=1)
    big_vision.load_npz(model, random_tree(tree_shapes(96, 1, 384, 6, 9, classes=5, gate=True)))
    path = str(tmp_path / "model.npz")
    big_vision.save_npz(model, path)
    loaded = timm.create_model("relu_vit_small_patch16_224", gate="silu", checkpoint_path=path, **size)
    assert all(torch.equal(v, model.state_dict()[k].float()) for k, v in loaded.state_dict().items())
    np.savez(path, **{f"other/{k}": v for k, v in big_vision.to_tree(model).items()}, step=np.zeros(()))
    loaded.load_pretrained(path, prefix="other/")
    with pytest.raises(ValueError, match="without a place"):
        timm.create_model("formix_vit", base="vit_small_patch16_224", checkpoint_path=path, **size)
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(ValueError, match="no npz file"):
        loaded.load_pretrained(str(tmp_path / "text.npz"))


def test_position_of_the_class_token():
    """A position added to the class token (older trees, timm's own ViTs) and none are the same function."""
    tree = random_tree(tree_shapes(96, 2, 384, 6, 9, classes=5, token=True, qk_norm=False))
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    expected = flax_vit(torch_tree(tree), images, h=None)
    position = np.random.default_rng(0).normal(size=(1, 1, 96))
    older = tree | {
        "cls": tree["cls"] - position,
        "pos_embedding": np.concatenate([position, tree["pos_embedding"]], 1),
    }
    same = timm.create_model("vit_small_patch16_224", act_layer="gelu_tanh", **SMALL).double().eval()
    for model in (small(design="softmax", global_pool="token"), same):
        for form in (tree, older):
            big_vision.load_npz(model, form)
            close(model(images), expected, 1e-10)
            exported = big_vision.to_tree(model)
            assert exported["pos_embedding"].shape == (1, 9, 96)
            close(torch.from_numpy(exported["cls"]), torch.from_numpy(tree["cls"]), 1e-6)


def test_refusals():
    tree = random_tree(tree_shapes(96, 2, 384, 6, 9, classes=5))
    with pytest.raises(ValueError, match="without a place"):
        big_vision.load_npz(small(depth=1), tree)
    with pytest.raises(ValueError, match="does not fit"):
        big_vision.load_npz(small(depth=3), tree)
    with pytest.raises(ValueError, match="9 positions, the model 16 patches"):
        big_vision.load_npz(small(img_size=64), tree)
    with pytest.raises(ValueError, match="without a place"):
        big_vision.load_npz(small(design="softmax"), tree)
    with pytest.raises(ValueError, match="no place for"):
        big_vision.to_tree(small(design="activator"))


def test_a_tree_of_other_heads_or_of_no_numbers_is_refused(tmp_path):
    """Sixteen channels are 4 heads of 4 or 2 of 8: the weights would fit, and compute something else."""
    size = {"img_size": 32, "depth": 1, "embed_dim": 16, "num_classes": 3, "qk_norm": False}
    two, four = (formix.create_model("relu_vit_small_patch16_224", num_heads=heads, **size) for heads in (2, 4))
    tree = big_vision.to_tree(two)
    with pytest.raises(ValueError, match=r"query/kernel has shape \(16, 2, 8\), and this model's is \(16, 4, 4\)"):
        big_vision.load_npz(four, tree)
    for name, array, words in (
        ("head/bias", np.array(["a", "b", "c"]), "weights are numbers"),
        ("head/bias", None, "head/bias has shape"),
        ("pos_embedding", np.zeros(4), "pos_embedding has shape"),
    ):
        with pytest.raises(ValueError, match=words):
            big_vision.load_npz(two, tree | {name: array})
    with pytest.raises(ValueError, match="no Vision Transformer"):
        big_vision.load_npz(torch.nn.Linear(2, 2), tree)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match="no npz file"):
        big_vision.load_npz(two, tmp_path / "one.npy")


def test_initialisation():
    model = timm.create_model("relu_vit_small_patch16_224", depth=2, head_bias=-10.0, gate="identity")
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    for weight, fans in [(w, 768) for w in attn.qkv.weight.chunk(3)] + [
        (attn.proj.weight, 768), (attn.gate.weight, 768), (mlp.fc1.weight, 1920), (mlp.fc2.weight, 1920),
    ]:  # fmt: skip
        bound = (6 / fans) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.1)
    assert not attn.qkv.bias.any()
    assert not attn.gate.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(384**-0.5, rel=0.02)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.02)
    assert (model.head.bias == -10).all()
    assert not model.head.weight.any()
    assert model.blocks[0].attn.q_norm.eps == model.norm.eps == 1e-6
    assert model.blocks[0].attn.q_norm.bias is None
    token = timm.create_model("relu_vit_small_patch16_224", depth=1, global_pool="token", head_bias=-6.9)
    assert not token.cls_token.any()
    assert (token.head.bias == -6.9).all()
    kept = timm.create_model("relu_vit_small_patch16_224", depth=1, head_zero_init=False)
    assert kept.head.weight.std().item() == pytest.approx(384**-0.5, rel=0.02)
    with pytest.raises(ValueError, match="weight_init is 'jax'; relu_vit_small_patch16_224 starts as big_vision's"):
        formix.create_model("relu_vit_small_patch16_224", depth=1, weight_init="jax")
    registers = timm.create_model("relu_vit_small_patch16_224", depth=1, reg_tokens=4)  # timm's, made without values
    assert registers.reg_token.std().item() == pytest.approx(1e-6, rel=0.1)
    pool = timm.create_model("relu_vit_small_patch16_224", depth=1, global_pool="map").attn_pool
    weights = [(w, 768) for w in (pool.q.weight, *pool.kv.weight.chunk(2), pool.proj.weight)]
    for weight, fans in [*weights, (pool.latent, 385), (pool.mlp.fc1.weight, 1920), (pool.mlp.fc2.weight, 1920)]:
        assert (fans / 6) ** 0.5 * weight.abs().max().item() == pytest.approx(1, rel=0.02)
    assert pool.mlp.fc2.bias.std().item() == pytest.approx(1e-6, rel=0.1)


# E_j[alpha_ij] L for queries and keys after LayerNorm, D = 64; ranges of the output's size relative to softmax's
ROW_SUMS = {"relu": 0.40, "relu2": 0.51, "gelu": 0.29, "softplus": 0.81, "identity": 0.0, "sigmoid": 0.50}
RMS = {"relu": (0.44, 0.46), "relu2": (0.75, 0.79), "sigmoid": (0.31, 0.36)}


@pytest.mark.parametrize("tokens", [50, 197, 785])
def test_initial_row_sums(tokens):
    q, k, v = (torch.randn(4, 4, tokens, 64) for _ in range(3))
    q, k = (torch.nn.functional.layer_norm(x, (64,)) for x in (q, k))
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v).square().mean().sqrt()
    for h, expected in ROW_SUMS.items():
        assert pointwise_attention(q, k, torch.ones_like(v[..., :1]), activation=h).mean().item() == pytest.approx(
            expected, abs=0.015
        ), h
    for h, (low, high) in RMS.items():
        ratio = (pointwise_attention(q, k, v, activation=h).square().mean().sqrt() / softmax).item()
        assert low - 0.015 < ratio < high + 0.015, h
