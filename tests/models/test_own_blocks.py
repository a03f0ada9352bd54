"""timm's names with blocks of their own kind: timm's numbers in softmax, and timm's own code around the straight-line
operators in every other design."""

import copy

import pytest
import timm
import torch
from oracles import H, close, l1, pointwise
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import formix
from formix.benchmarks import count_flops
from formix.conversion.source import open_source
from formix.training.diagnostics import diagnose

SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 4, "num_classes": 5}
ROTARY = ("rope", "dinov3", "lingbot", "_pe_", "sapiens2")
PLAIN = "vit_wee_patch16_reg1_gap_256"
MARKS = (*ROTARY, "relpos", "18x2", "_rpn", "_xp_", "wee_", "_dlittle_")
NAMES = [n for n in timm.list_models("vit_*") if any(mark in n for mark in MARKS) and n != PLAIN]
MORE = ["eva02_tiny_patch14_224", "eva02_enormous_patch14_clip_224"]  # sub-LN, SwiGLU; norms behind the branches
# one of each kind of block and of positions, for what does not need all names
KINDS = {
    "axial": "vit_small_patch16_rope_224",
    "mixed": "vit_small_patch16_rope_mixed_ape_224",
    "dinov3": "vit_small_plus_patch16_dinov3_qkvb",
    "grouped": "vit_base_patch16_sapiens2",
    "perception": "vit_pe_core_tiny_patch16_384",
    "no_key_bias": "vit_base_patch16_rope_reg1_gap_256",
    "sub_norms": "eva02_tiny_patch14_224",
    "eva_post_norm": "eva02_enormous_patch14_clip_224",
    "relative": "vit_relpos_small_patch16_224",
    "relative_token": "vit_relpos_medium_patch16_cls_224",
    "relative_shared": "vit_srelpos_small_patch16_224",
    "relative_post_norm": "vit_relpos_small_patch16_rpn_224",
    "post_norm": "vit_base_patch16_rpn_224",
    "things": "vit_small_patch16_18x2_224",
    "parallel": "vit_base_patch16_xp_224",
    "differential": "vit_dwee_patch16_reg1_gap_256",
    "differential_parallel": "vit_dpwee_patch16_reg1_gap_256",
}
REARRANGED = ("axial", "mixed", "dinov3", "grouped", "sub_norms", "relative", "relative_shared", "differential")


def small(name, **more):
    """Arguments that make timm's `name` small: 2 x 3 patches, 64 channels in 4 heads, 2 layers."""
    patch = int(name.split("patch")[1].split("_")[0])
    grouped = {"num_kv_heads": 2} if "sapiens2" in name else {}
    return SMALL | grouped | {"img_size": (2 * patch, 3 * patch)} | more


def random(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.02, std=0.15)
    return model


def pair(name, design="softmax", dtype=torch.float64, **more):
    """Ours, timm's with the same weights, and images."""
    theirs = random(timm.create_model(name, **small(name, **more))).to(dtype).eval()
    ours = formix.create_model(name, design, **small(name, **more)).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs, torch.randn(2, 3, *theirs.patch_embed.img_size, dtype=dtype)


def operator(monkeypatch, mixer):
    """Put a straight-line operator in the place where timm calls its fused softmax. Pooling by attention, which has one
    query, keeps the softmax."""
    softmax = torch.nn.functional.scaled_dot_product_attention

    def called(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
        if query.shape[2] != key.shape[2]:
            return softmax(query, key, value)
        assert not is_causal
        return mixer(query, key, value, attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", called)


def relu_with_bias(query, key, value, bias):
    if bias is None:
        return pointwise(query, key, value)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * query.shape[3] ** -0.5 + bias
    return torch.einsum("bhij,bhje->bhie", H["relu"](scores), value) / key.shape[2]


def sima_with_bias(query, key, value, bias):
    out = l1(query, key, value)
    return out if bias is None else out + torch.einsum("hij,bhje->bhie", bias[0], value) / key.shape[2]


@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_softmax_is_timm_s_model(name):
    ours, theirs, images = pair(name)
    with torch.no_grad():
        expected = theirs(images)
        close(ours(images), expected, 1e-10)
        close(ours.float()(images.float()), theirs.float()(images.float()), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("design", ["relu", "sima"])
def test_designs_are_timm_s_code_around_the_operator(kind, design, monkeypatch):
    ours, theirs, images = pair(KINDS[kind], design)
    cotangent = torch.randn(2, 5, dtype=torch.float64)
    logits = ours(images)
    logits.backward(cotangent)
    operator(monkeypatch, {"relu": relu_with_bias, "sima": sima_with_bias}[design])
    expected = theirs(images)
    expected.backward(cotangent)
    close(logits, expected, 1e-10)
    assert not torch.allclose(expected, pair(KINDS[kind])[1](images))
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        close(parameter.grad, gradients[name].grad, 1e-9, f"gradient of {name}", floor=0.1)


@pytest.mark.parametrize("kind", REARRANGED)
@pytest.mark.parametrize("design", ["paf", "parallel", "softmax(norm=post)"])
def test_layouts_are_timm_s_parts_in_another_order(kind, design):
    """x = norm2(x + A x + F x), x + A h + F h with h = norm1 x, and the post-norm series, from the parts of timm's
    block with the same weights."""
    ours, theirs = rearranged(KINDS[kind], design)
    block, x = theirs.blocks[0], torch.randn(2, 6 + theirs.num_prefix_tokens, 64, dtype=torch.float64)
    given = {}
    if hasattr(theirs, "rope"):
        rope = theirs.rope.get_embed(shape=(2, 3)) if theirs.dynamic_img_size else theirs.rope.get_embed()
        given["rope"] = rope[0] if theirs.rope_mixed else rope
    if getattr(theirs, "shared_rel_pos", None) is not None:
        given["shared_rel_pos"] = theirs.shared_rel_pos.get_bias()

    def branch(i, module, h, **more):
        y = module(h, **more)
        if hasattr(block, f"ls{i}"):
            return getattr(block, f"ls{i}")(y)
        gamma = getattr(block, f"gamma_{i}")
        return y if gamma is None else gamma * y

    if design == "paf":
        expected = block.norm2(x + branch(1, block.attn, x, **given) + branch(2, block.mlp, x))
    elif design == "parallel":
        h = block.norm1(x)
        expected = x + branch(1, block.attn, h, **given) + branch(2, block.mlp, h)
    else:
        y = block.norm1(x + branch(1, block.attn, x, **given))
        expected = block.norm2(y + branch(2, block.mlp, y))
    close(ours.blocks[0](x, **given), expected, 1e-10)


def rearranged(name, design):
    """As `pair`; norms that the layout does not apply have no place in ours."""
    theirs = random(timm.create_model(name, **small(name, depth=1))).double().eval()
    ours = formix.create_model(name, design, **small(name, depth=1)).double().eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    unused = {"paf": {"norm1"}, "parallel": {"norm2"}}.get(design, set())
    assert not missing
    assert {key.split(".")[2] for key in unexpected} == unused
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS)
def test_saving_features_and_checkpointing(kind, tmp_path):
    ours, theirs, images = pair(KINDS[kind], "relu", torch.float32)
    expected = ours(images)
    formix.save(ours, tmp_path)
    for loaded in (formix.load(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()):
        assert type(loaded) is type(ours)
        assert loaded.design == formix.design("relu")
        close(loaded(images), expected, 1e-6)
    softmax = formix.create_model(tmp_path, design="softmax").eval()
    close(softmax(images), theirs(images), 1e-5)

    final, outputs = ours.forward_intermediates(images)
    close(final, ours.forward_features(images), 1e-6)
    assert [y.shape for y in outputs] == [(2, 64, 2, 3)] * 2
    features = timm.create_model("formix_vit", base=KINDS[kind], design="relu", features_only=True, out_indices=(0, 1),
                                 **small(KINDS[kind]))  # fmt: skip
    assert [y.shape for y in features(images)] == [y.shape for y in outputs]
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.no_weight_decay() == theirs.no_weight_decay()

    gradients = []
    for enable in (False, True):
        ours.zero_grad()
        ours.train().set_grad_checkpointing(enable)
        torch.manual_seed(7)  # dropout inside the relative positions, stretched rotary ones
        ours(images).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in ours.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, 1e-5, f"gradient of {name}", floor=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_features_by_torchvision_s_tracing(kind):
    """The only leaves of its graph are those of PyTorch; operators are nodes."""
    ours, _, images = pair(KINDS[kind], "relu")
    head = create_feature_extractor(ours, ["head"]).eval()
    close(head(images)["head"], ours(images), 1e-10)


def test_a_changed_head_is_saved(tmp_path):
    for name in ("vit_base_patch16_rope_reg1_gap_256", "vit_pe_core_tiny_patch16_384", "vit_relpos_small_patch16_224"):
        ours, _, images = pair(name, "sima", torch.float32)
        ours.reset_classifier(9, "avg")
        ours.eval()
        formix.save(ours, tmp_path)
        loaded = formix.load(tmp_path)
        assert (loaded.num_classes, loaded.global_pool) == (9, "avg")
        close(loaded(images), ours(images), 1e-6)


def test_masks_and_other_sizes():
    ours, theirs, _ = pair("vit_small_patch16_dinov3")
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64)  # dynamic: 12 patches and 5 tokens
    mask = torch.rand(17, 17) > 0.3
    mask[:, 0] = True
    with torch.no_grad():
        close(ours(images), theirs(images), 1e-10)
        close(ours(images, attn_mask=mask), theirs(images, attn_mask=mask), 1e-10)
        close(ours(images, is_causal=True), theirs(images, is_causal=True), 1e-10)
        for design in ("relu", "sima"):
            other = pair("vit_small_patch16_dinov3", design)[0]
            keys = torch.ones(17, dtype=torch.bool)
            close(other(images, attn_mask=keys), other(images), 1e-10)
    with pytest.raises(ValueError, match="SimA cannot be causal"):
        other(images, is_causal=True)


@pytest.mark.parametrize("kind", ["axial", "mixed"])
def test_patches_dropped_in_training_take_their_positions_along(kind):
    ours, theirs, images = pair(KINDS[kind], patch_drop_rate=0.5)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        outputs.append(model.train()(images))
    close(*outputs, 1e-10)


@pytest.mark.parametrize(
    "kind", ["axial", "no_key_bias", "relative", "parallel", "differential", "things", "post_norm"]
)
def test_the_mixer_s_own_parameters(kind):
    """Query and key norms and a gate, for every attention."""
    plain, gated = (
        random(formix.create_model(KINDS[kind], f"relu(qk_norm=true{gate})", **small(KINDS[kind]))).double().eval()
        for gate in ("", ",gate=identity")
    )
    new = [name for name in gated.state_dict() if ".gate." in name]
    assert len(new) == {"things": 8}.get(kind, 4)
    state = gated.state_dict()
    plain.load_state_dict({k: v for k, v in state.items() if k not in new}, strict=True)
    for name in new:
        state[name].fill_(1.0 if name.endswith("bias") else 0.0)  # a gate of 1
    images = torch.randn(2, 3, *plain.patch_embed.img_size, dtype=torch.float64)
    close(gated(images), plain(images), 1e-10)
    for name in new:
        if name.endswith("bias"):
            state[name].fill_(0.0)
    assert not torch.allclose(gated(images), plain(images))
    norms = [m for n, m in gated.named_modules() if n.endswith(("q_norm", "k_norm"))]
    assert all(type(m) is nn.LayerNorm and m.bias is None and m.eps == 1e-6 for m in norms)


def test_hybrids():
    ours, theirs, images = pair("vit_small_patch16_rope_224", 'relu(layers={"0": "softmax", "1": "softmax"})')
    close(ours(images), theirs(images), 1e-10)
    mixed = formix.create_model("vit_relpos_small_patch16_224", 'sima(layers={"-1": "softmax"})', **SMALL)
    assert [b.attn.mixer.kind for b in mixed.blocks] == ["sima", "softmax"]


@pytest.mark.parametrize(
    (
        "name",
        "design",
        "products",
    ),  # operations of one layer's operator besides its linear layers, N = 6, D = 16, H = 4
    [
        ("vit_relpos_small_patch16_224", "relu", 4 * 4 * 6 * 6 * 16),
        ("vit_relpos_small_patch16_224", "sima", (4 + 2) * 4 * 6 * 6 * 16),  # and the bias times the values
        ("vit_dwee_patch16_reg1_gap_256", "relu", 2 * 2 * 4 * 7 * 7 * (8 + 16)),  # a register; both differences
    ],
)
def test_operations_are_counted(name, design, products):
    model = formix.create_model(name, design, **small(name))
    rows = {"patch_embed": 6, "blocks": 6 + model.num_prefix_tokens, "head": 1, "rel_pos": 3 * 5}  # (2 2 - 1)(2 3 - 1)
    linear = sum(
        2 * m.weight.numel() * next(n for part, n in reversed(rows.items()) if part in path)
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    )
    counted = count_flops(model, torch.empty(1, 3, *model.patch_embed.img_size))
    assert counted == linear + 2 * products


@pytest.mark.parametrize("name", ["vit_dwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"])
def test_operations_of_sima_in_differential_attention(name):
    """Its cheaper order counts: H heads of D channels, 2 D of values, N = 7."""
    for heads, linear in ((16, True), (4, False)):  # D = 2, D = 8
        relu, sima = (formix.create_model(name, d, **small(name, num_heads=heads)) for d in ("relu", "sima"))
        images, d = torch.empty(1, 3, *relu.patch_embed.img_size), 64 // heads // 2
        saved = 2 * 2 * heads * (7 * 7 * (d + 2 * d) - 2 * 7 * d * 2 * d) if linear else 0
        assert count_flops(relu, images) - count_flops(sima, images) == 2 * saved


def test_size_of_the_bias_part_at_the_start():
    """Why SimA's is divided by the number of tokens: undivided it is tens of times softmax's output."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = formix.create_model("vit_relpos_small_patch16_224", "sima", depth=1).eval()
        q, k, v = torch.randn(3, 1, 6, 196, 64)
        with torch.no_grad():
            bias = model.blocks[0].attn.rel_pos.get_bias()
            softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).std()
            assert 10 < (bias @ v).std() / softmax < 100
            assert 0.05 < (bias @ v / 196).std() / softmax < 0.5


@pytest.mark.parametrize("kind", ["relative", "differential"])
def test_share_of_active_scores(kind):
    """With the bias that is added to them, and over both differences."""
    model = random(formix.create_model(KINDS[kind], "relu", **small(KINDS[kind], depth=1))).eval()
    images, attn = torch.randn(2, 3, *model.patch_embed.img_size), model.blocks[0].attn
    seen = []
    attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    share = diagnose(model, {"pixel_values": images})["active/blocks.0.attn"]
    q, k, _ = attn.qkv(seen[0]).unflatten(-1, (3, -1, attn.head_dim)).permute(2, 0, 3, 1, 4)  # [B, H, N, D]
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * attn.head_dim**-0.5
    if kind == "relative":
        without, scores = scores, scores + attn.rel_pos.get_bias()
        assert (without > 0).float().mean() != (scores > 0).float().mean()
    assert share == pytest.approx((scores > 0).float().mean().item(), abs=1e-6)


REFUSED = {
    "skip": ("axial", "skip", "hand on keys and values"),
    "no_tokens_mixed": ("dinov3", "activator", "mixes no tokens"),
    "heads": ("axial", "sima(num_heads=1)", "pass num_heads to the model"),
    "no_ffn": ("relative", "relu(ffn=false)", "always have their FFN"),
    "order": ("post_norm", "relu+paf", "ResPostBlock is defined by the order"),
    "order_eva": ("eva_post_norm", "paf", "EvaBlockPostNorm is defined"),
    "order_parallel": ("parallel", "paf", "ParallelScalingBlock is defined"),
    "order_things": ("things", "parallel", "ParallelThingsBlock is defined"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    kind, design, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        formix.create_model(KINDS[kind], design, **small(KINDS[kind]))


def test_known_blocks_in_a_trunk_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"is a Qwen3VitEncoder; formix knows"):
        formix.create_model("qwen3_vit_88m_enc", "relu")


def test_parallel_is_the_parallel_blocks_own_layout():
    ours, theirs, images = pair("vit_base_patch16_xp_224", "parallel")
    close(ours(images), theirs(images), 1e-10)


EXPORTED = ("mixed", "no_key_bias", "relative", "parallel", "differential")


@pytest.mark.parametrize(
    "kind", [k if k in ("mixed", "relative") else pytest.param(k, marks=pytest.mark.slow) for k in EXPORTED]
)
def test_export(kind):
    ours, _, images = pair(KINDS[kind], "sima")
    program = torch.export.export(ours, (images,), strict=False)
    with torch.no_grad():
        close(program.module()(images), ours(images), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPORTED)
def test_compile(kind):
    torch.compiler.reset()
    ours, _, images = pair(KINDS[kind], "relu")
    with torch.no_grad():
        close(torch.compile(ours, fullgraph=True, backend="aot_eager")(images), ours(images), 1e-10)


def test_torchscript_and_conversion_of_several_branches_are_refused_with_a_way_out():
    for kind in ("parallel", "things"):
        ours, theirs, _ = pair(KINDS[kind], "relu")
        with pytest.raises(ValueError, match=r"has blocks of several branches.*create_model\(DIRECTORY"):
            open_source(ours)
        with pytest.raises(ValueError, match=r"has blocks of its own \(Parallel.*one attention"):
            open_source(theirs)
    with pytest.raises(ValueError, match=r"torch\.export"):
        torch.jit.script(pair("vit_small_patch16_rope_224", "relu")[0])


def test_copies_are_independent():
    ours, _, images = pair("vit_small_patch16_rope_224", "relu")
    other = copy.deepcopy(ours)
    nn.init.zeros_(other.head.weight)
    assert ours(images).std() > 0
    assert type(other.blocks[0].attn) is type(ours.blocks[0].attn)
