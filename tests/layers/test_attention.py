"""Attention layers against timm's, torch's and the operators' float64 formulas."""

import math

import pytest
import timm
import torch
from oracles import close, l1, pointwise, softmax
from timm.layers import Attention as TimmAttention
from torch import nn

from formix.design import GatedUnit, Pointwise, Sima, Softmax
from formix.layers import Attention, PointwiseAttention, SimaAttention, SoftmaxAttention

DIM, HEADS = 24, 3
ORACLES = {
    "softmax": (Softmax(), softmax),
    "relu": (Pointwise(), pointwise),
    "gelu_sqrt": (
        Pointwise(activation="gelu", length_exponent=0.5),
        lambda q, k, v, **o: pointwise(q, k, v, activation="gelu", length_exponent=0.5, **o),
    ),
    "fixed_length": (Pointwise(length=40), lambda q, k, v, **o: pointwise(q, k, v, length=40, **o)),
    "all_keys": (Pointwise(length="keys"), lambda q, k, v, **o: pointwise(q, k, v, length=k.shape[2], **o)),
    "sigmoid_bias": (
        Pointwise(activation="sigmoid_bias"),
        lambda q, k, v, **o: pointwise(q, k, v, activation="sigmoid_bias", **o),
    ),
    "sima": (Sima(), l1),
}
GATES = {
    None: lambda g: torch.ones_like(g),
    "identity": lambda g: g,
    "silu": nn.functional.silu,
    "sigmoid": torch.sigmoid,
}


def by_hand(layer, x, operator, gate=None, **arguments):
    """The layer's formula out of its parameters."""
    b, n, _ = x.shape
    q, k, v = layer.qkv(x).reshape(b, n, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    q, k = layer.q_norm(q), layer.k_norm(k)
    out = operator(q, k, v, **arguments).transpose(1, 2).reshape(b, n, -1)
    out = layer.norm(out)
    return layer.proj(out * GATES[gate](layer.gate(x)) if gate else out)


def randomised(layer):
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer.double().eval()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("case", ORACLES)
def test_formula(case, bias):
    mixer, operator = ORACLES[case]
    layer = randomised(Attention(DIM, HEADS, mixer=mixer, qkv_bias=bias, proj_bias=bias))
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    close(layer(x), by_hand(layer, x, operator), 1e-10)


@pytest.mark.parametrize("case", [c for c in ORACLES if c != "sima"])
def test_masks_and_causal(case):
    mixer, operator = ORACLES[case]
    layer = randomised(Attention(DIM, HEADS, mixer=mixer))
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    mask = torch.rand(2, 1, 7, 7) > 0.3
    mask[..., 0] = True
    keys = torch.arange(7) < 5
    for arguments in (
        {"attn_mask": mask}, {"attn_mask": keys}, {"is_causal": True}, {"attn_mask": mask, "is_causal": True},
    ):  # fmt: skip
        close(layer(x, **arguments), by_hand(layer, x, operator, **arguments), 1e-10)


def test_additive_masks_are_for_softmax():
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    seen = torch.rand(7, 7) > 0.3
    seen[:, 0] = True
    additive = torch.zeros(7, 7, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    layer = randomised(SoftmaxAttention(DIM, HEADS))
    close(layer(x, additive), layer(x, seen), 1e-12)
    close(layer(x, additive, is_causal=True), layer(x, seen, is_causal=True), 1e-12)
    for other in (PointwiseAttention(DIM, HEADS), SimaAttention(DIM, HEADS)):
        with pytest.raises(ValueError, match="boolean mask"):
            other.double()(x, additive)


@pytest.mark.parametrize("gate", ["identity", "silu", "sigmoid"])
@pytest.mark.parametrize("mixer", [Softmax, Pointwise])
def test_gate(mixer, gate):
    layer = randomised(Attention(DIM, HEADS, mixer=mixer(gate=gate), qkv_bias=True))
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    close(layer(x), by_hand(layer, x, softmax if mixer is Softmax else pointwise, gate), 1e-10)


@pytest.mark.parametrize("mixer", [Softmax, Pointwise])
def test_the_paper_s_query_key_norm_has_a_scale_only(mixer):
    layer = randomised(Attention(DIM, HEADS, mixer=mixer(qk_norm=True)))
    assert {n for n, _ in layer.named_parameters() if "norm" in n} == {"q_norm.weight", "k_norm.weight"}
    assert layer.q_norm.eps == layer.k_norm.eps == 1e-6
    assert layer.q_norm.weight.shape == (DIM // HEADS,)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    close(layer(x), by_hand(layer, x, softmax if mixer is Softmax else pointwise), 1e-10)


TIMM = {
    "plain": {},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "scale_norm": {"scale_norm": True, "norm_layer": nn.LayerNorm},
    "no_proj_bias": {"proj_bias": False},
    "head_dim": {"attn_head_dim": 5},
    "dim_out": {"dim_out": 11},
}


@pytest.mark.parametrize("case", TIMM)
def test_softmax_is_timm_s_attention(case):
    theirs = TimmAttention(DIM, HEADS, **TIMM[case]).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    ours = SoftmaxAttention(DIM, HEADS, **TIMM[case]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 7, DIM)
    mask = torch.rand(7, 7) > 0.3
    mask[:, 0] = True
    for arguments in ({}, {"attn_mask": mask}, {"is_causal": True}):
        close(ours(x, **arguments), theirs(x, **arguments), 1e-6)


def test_gated_softmax_is_timm_s_gated_attention():
    theirs = TimmAttention(DIM, HEADS, gated=True, qkv_bias=True).eval()
    ours = SoftmaxAttention(DIM, HEADS, gate="sigmoid", qkv_bias=True).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 7, DIM)
    close(ours(x), theirs(x), 1e-6)


LAYERS = {"softmax": SoftmaxAttention, "pointwise": PointwiseAttention, "sima": SimaAttention}


@pytest.mark.parametrize("layer", LAYERS)
def test_plugs_into_timm_s_vision_transformer(layer):
    """timm's own trunk takes the layers as `attn_layer`: softmax gives timm's logits, the others train."""
    arguments = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    theirs = timm.models.VisionTransformer(**arguments).eval()
    ours = timm.models.VisionTransformer(**arguments, attn_layer=LAYERS[layer]).eval()
    assert all(type(b.attn) is LAYERS[layer] for b in ours.blocks)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 16, 16)
    out = ours(x)
    assert torch.allclose(out, theirs(x), atol=1e-6) is (layer == "softmax")
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_sima_padding_is_that_of_the_unpadded_input():
    layer = randomised(SimaAttention(DIM, HEADS))
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    padded = torch.cat([x, torch.randn(2, 4, DIM, dtype=torch.float64)], 1)
    keys = torch.arange(11) < 7
    for mask in (keys.expand(2, 1, 1, 11), keys[None, None, None], keys[None], keys):
        close(layer(padded, mask)[:, :7], layer(x), 1e-12)


def test_sima_takes_masks_of_keys_only():
    layer = SimaAttention(DIM, HEADS)
    x = torch.randn(7, 7, DIM)  # as many elements as tokens: a [queries, keys] mask must not pass for a padding mask
    for mask in (
        torch.ones(7, 7),
        torch.ones(7, 1, 7, 7),
        torch.ones(7, 3, 1, 7),
        torch.ones(1, 1, 7, 7),
        torch.ones(6),
    ):
        with pytest.raises(ValueError, match=r"attn_mask has shape .*pass a mask of keys"):
            layer(x, mask.bool())
    with pytest.raises(ValueError, match="cannot be causal"):
        layer(x, is_causal=True)


def test_sima_has_its_own_number_of_heads():
    single = Attention(DIM, HEADS, mixer=Sima(num_heads=1))
    assert (single.num_heads, single.head_dim) == (1, DIM)
    x = torch.randn(2, 7, DIM)
    close(single(x), by_hand(single.double(), x.double(), l1), 1e-4)


@pytest.mark.parametrize("length", ["visible", "keys", 10])
def test_length(length):
    """Zero queries give sigmoid scores of one half: the weights tell the length."""
    layer = PointwiseAttention(4, 1, activation="sigmoid", length=length, qkv_bias=True).double()
    with torch.no_grad():
        layer.qkv.weight.zero_()
        layer.qkv.bias.copy_(torch.tensor([0.0] * 8 + [1.0] * 4))
        layer.proj.weight.copy_(torch.eye(4))
        layer.proj.bias.zero_()
    out = layer(torch.randn(1, 6, 4, dtype=torch.float64), is_causal=True)[0, :, 0]
    seen = torch.arange(1, 7).double()
    divisor = {"visible": seen, "keys": torch.full((6,), 6.0), 10: torch.full((6,), 10.0)}[length]
    close(out, 0.5 * seen / divisor, 1e-12)


def test_attention_dropout_is_active_in_training_only():
    for layer in (SoftmaxAttention(DIM, HEADS, attn_drop=0.5), PointwiseAttention(DIM, HEADS, attn_drop=0.5)):
        x = torch.randn(1, 7, DIM)
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))
    sima = SimaAttention(DIM, HEADS, attn_drop=0.5)
    x = torch.randn(1, 7, DIM)
    assert torch.equal(sima(x), sima(x)), "the official code never applies it"
    projected = SoftmaxAttention(DIM, HEADS, proj_drop=0.5)
    assert (projected(x) == 0).any()


@pytest.mark.parametrize("case", ORACLES)
def test_skip_heads_read_the_source(case):
    mixer, operator = ORACLES[case]
    layer = randomised(Attention(DIM, HEADS, mixer=mixer, skip_heads=(0, 2)))
    x, source = torch.randn(2, 7, DIM, dtype=torch.float64), torch.randn(2, 2, HEADS, 7, 8, dtype=torch.float64)
    out, own = layer(x, source_kv=(source[0], source[1]), return_kv=True)

    def mixed(q, k, v):
        k, v = k.clone(), v.clone()
        k[:, [0, 2]], v[:, [0, 2]] = source[0][:, [0, 2]], source[1][:, [0, 2]]
        return operator(q, k, v)

    close(out, by_hand(layer, x, mixed), 1e-10)
    qkv = layer.qkv(x).reshape(2, 7, 3, HEADS, 8).permute(2, 0, 3, 1, 4)
    close(own[0], qkv[1], 1e-12, "own keys")
    close(own[1], qkv[2], 1e-12, "own values")
    close(layer(x), by_hand(layer, x, operator), 1e-10, "without a source")


@pytest.mark.parametrize("mixer", [Softmax(), Pointwise(), Pointwise(qk_norm=True)], ids=["softmax", "relu", "qk_norm"])
def test_autocast_casts_the_source_too(mixer):
    layer = randomised(Attention(DIM, HEADS, mixer=mixer, skip_heads=(0, 2))).float()
    x, source = torch.randn(2, 7, DIM), torch.randn(2, 2, HEADS, 7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, source_kv=(source[0], source[1]))
        mixed = layer(x, source_kv=(source[0].bfloat16(), source[1]))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, mixed)
    close(out, layer(x, source_kv=(source[0], source[1])), 3e-2)


def test_refused():
    with pytest.raises(ValueError, match="num_heads is 5; it must divide dim, which is 24"):
        Attention(24, 5)
    with pytest.raises(ValueError, match="num_heads is 7"):
        Attention(24, 4, mixer=Sima(num_heads=7))
    with pytest.raises(ValueError, match=r"use formix\.layers\.GatedUnit"):
        Attention(24, 4, mixer=GatedUnit())
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        PointwiseAttention(24, 4, activation="tanh")


@pytest.mark.parametrize("case", ORACLES)
def test_autocast(case):
    """bfloat16 autocast gives the float32 result to bfloat16's precision, norms of queries and keys included."""
    mixer, _ = ORACLES[case]
    layer = Attention(DIM, HEADS, mixer=mixer, qk_norm=True, norm_layer=nn.LayerNorm)
    x = torch.randn(2, 7, DIM)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    close(out, expected, 3e-2)
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_initial_scale_is_the_head_size():
    assert Attention(DIM, HEADS).scale == pytest.approx(1 / math.sqrt(8))
    assert Attention(DIM, HEADS, attn_head_dim=5).scale == pytest.approx(1 / math.sqrt(5))
