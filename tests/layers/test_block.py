"""Blocks: of timm, of transformers' BERT and GPT-2, and by formula."""

import copy
import pickle

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from oracles import close, source_of
from torch import nn
from transformers import BertConfig, GPT2Config
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

import formix
from formix.design import Layout, Sima, Softmax
from formix.layers import Block

DIM, HEADS = 24, 3


def randomised(module, dtype=torch.float32):
    for p in module.parameters():
        nn.init.normal_(p, mean=0.1, std=0.3)
    return module.to(dtype).eval()


def block_of(any_design, **options):
    """A block in the place of the second of two layers: with a single layer skip wiring has no source."""
    return Block(DIM, HEADS, design=formix.design(any_design).layer(1, 2), **options)


def run(block, x, **arguments):
    return block(x, **source_of(block, x), **arguments)


def seen_mask():
    mask = torch.rand(2, 1, 7, 7) > 0.3
    mask[..., 0] = True
    return mask


# ------------------------------------------------------------------------------------------------------------- timm

TIMM = {
    "plain": {},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True},
    "layer_scale": {"init_values": 1e-2},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no_proj_bias": {"proj_bias": False},
    "mlp_ratio": {"mlp_ratio": 2.5},
    "drop_path": {"drop_path": 0.3, "proj_drop": 0.2, "attn_drop": 0.1},
    "gelu_tanh": {"act_layer": lambda: nn.GELU(approximate="tanh")},
}


@pytest.mark.parametrize("case", TIMM)
def test_softmax_is_timm_s_block(case):
    theirs = randomised(timm_vit.Block(DIM, HEADS, **TIMM[case]))
    ours = Block(DIM, HEADS, **TIMM[case]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 7, DIM)
    for arguments in ({}, {"attn_mask": seen_mask()}, {"is_causal": True}):
        close(ours(x, **arguments), theirs(x, **arguments), 1e-6)


def test_softmax_gradients_are_timm_s():
    theirs = randomised(timm_vit.Block(DIM, HEADS, qkv_bias=True, init_values=0.1)).train()
    ours = Block(DIM, HEADS, qkv_bias=True, init_values=0.1).train()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 7, DIM)
    for block in (ours, theirs):
        block(x).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        close(p.grad, expected[name].grad, 1e-5, f"gradient of {name}")


@pytest.mark.parametrize("fuse_out_proj", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_parallel_is_timm_s_parallel_block(qk_norm, fuse_out_proj):
    """timm's ParallelScalingBlock has the FFN's rows first and, without qkv bias, a bias of the FFN alone."""
    ours = randomised(Block(DIM, HEADS, design="parallel", qk_norm=qk_norm, proj_bias=True))
    theirs = timm_vit.ParallelScalingBlock(DIM, HEADS, qk_norm=qk_norm, fuse_out_proj=fuse_out_proj).eval()
    w, mapped = ours.state_dict(), {}
    for name, source in (("in_norm", "norm1"), ("q_norm", "attn.q_norm"), ("k_norm", "attn.k_norm")):
        mapped |= {k.replace(source, name): v for k, v in w.items() if k.startswith(source + ".")}
    mapped["in_proj.weight"] = torch.cat([w["mlp.fc1.weight"], w["attn.qkv.weight"]])
    mapped["mlp_bias"] = w["mlp.fc1.bias"]
    if fuse_out_proj:
        mapped["out_proj.weight"] = torch.cat([w["attn.proj.weight"], w["mlp.fc2.weight"]], 1)
        mapped["out_proj.bias"] = w["attn.proj.bias"] + w["mlp.fc2.bias"]
    else:
        for name, source in (("attn_out_proj", "attn.proj"), ("mlp_out_proj", "mlp.fc2")):
            mapped |= {f"{name}.{kind}": w[f"{source}.{kind}"] for kind in ("weight", "bias")}
    theirs.load_state_dict(mapped, strict=True)
    x = torch.randn(2, 7, DIM)
    for arguments in ({}, {"attn_mask": seen_mask()}, {"is_causal": True}):
        close(ours(x, **arguments), theirs(x, **arguments), 1e-6)


# ----------------------------------------------------------------------------------------------------- transformers


def bert_weights(layer):
    """The state dict of a post-norm Block out of transformers' BertLayer."""
    w = layer.state_dict()
    mapped = {}
    for kind in ("weight", "bias"):
        mapped[f"attn.qkv.{kind}"] = torch.cat([w[f"attention.self.{n}.{kind}"] for n in ("query", "key", "value")])
        mapped[f"attn.proj.{kind}"] = w[f"attention.output.dense.{kind}"]
        mapped[f"norm1.{kind}"] = w[f"attention.output.LayerNorm.{kind}"]
        mapped[f"mlp.fc1.{kind}"] = w[f"intermediate.dense.{kind}"]
        mapped[f"mlp.fc2.{kind}"] = w[f"output.dense.{kind}"]
        mapped[f"norm2.{kind}"] = w[f"output.LayerNorm.{kind}"]
    return mapped


def bert_layer():
    config = BertConfig(hidden_size=DIM, num_attention_heads=HEADS, intermediate_size=4 * DIM)
    config._attn_implementation = "sdpa"
    return randomised(BertLayer(config)), config.layer_norm_eps


def norm_of(eps):
    return lambda dim, **kwargs: nn.LayerNorm(dim, eps=eps, **kwargs)


def test_post_norm_softmax_is_bert_s_layer():
    theirs, eps = bert_layer()
    ours = Block(DIM, HEADS, qkv_bias=True, norm="post", norm_layer=norm_of(eps)).eval()
    ours.load_state_dict(bert_weights(theirs), strict=True)
    x = torch.randn(2, 7, DIM)
    close(ours(x), theirs(x), 1e-6)
    mask = torch.rand(2, 1, 1, 7) > 0.3
    mask[..., 0] = True
    close(ours(x, attn_mask=mask), theirs(x, attention_mask=mask), 1e-6)


@pytest.mark.parametrize("official", [False, True])
def test_paf_is_bert_s_layer_rewired(official):
    """y = LN2(x + A(x) Wo + bo + gelu(x W1 + b1) W2 + b2): the same parameters, except LN1 unless official."""
    theirs, eps = bert_layer()
    ours = Block(
        DIM, HEADS, qkv_bias=True, norm="post", norm_layer=norm_of(eps), design=formix.design("paf", official=official)
    ).eval()
    weights = bert_weights(theirs)
    if not official:
        weights = {k: v for k, v in weights.items() if not k.startswith("norm1")}
    ours.load_state_dict(weights, strict=True)
    x = torch.randn(2, 7, DIM)
    attention = theirs.attention.output.dense(theirs.attention.self(x)[0])
    ffn = theirs.output.dense(theirs.intermediate(x))
    expected = theirs.output.LayerNorm(x + attention + ffn)
    close(ours(x), expected, 1e-6)
    ours(x).sum().backward()
    if official:
        assert ours.norm1.weight.grad is None
    assert ours.norm2.weight.grad is not None


def test_causal_pre_norm_softmax_is_gpt_2_s_block():
    config = GPT2Config(n_embd=DIM, n_head=HEADS)
    config._attn_implementation = "sdpa"
    theirs = randomised(GPT2Block(config, layer_idx=0))
    w, mapped = theirs.state_dict(), {}
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for source, name in names.items():
        weight = w[f"{source}.weight"]
        mapped[f"{name}.weight"] = weight.T if weight.dim() == 2 else weight
        mapped[f"{name}.bias"] = w[f"{source}.bias"]
    ours = Block(
        DIM, HEADS, qkv_bias=True, norm_layer=norm_of(1e-5), act_layer=lambda: nn.GELU(approximate="tanh")
    ).eval()
    ours.load_state_dict(mapped, strict=True)
    x = torch.randn(2, 7, DIM)
    expected = theirs(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    close(ours(x, is_causal=True), expected, 1e-6)


# --------------------------------------------------------------------------------------------------- every design


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_formula(any_design, norm):
    """The layout's formula over the block's own parts, with layer scale."""
    block = randomised(block_of(any_design, norm=norm, qkv_bias=True, init_values=0.3), torch.float64)
    layout = block.layout
    x = torch.randn(2, 7, DIM, dtype=torch.float64)

    def a(h):
        return block.attn(h, **source_of(block, x)) * block.ls1.gamma

    def f(h):
        return block.mlp(h) * block.ls2.gamma if layout.ffn else 0

    n, m = block.norm1, block.norm2
    if layout.parallel:
        expected = x + a(n(x)) + f(n(x)) if (layout.norm or norm) == "pre" else m(x + a(x) + f(x))
    elif (layout.norm or norm) == "pre":
        y = x + a(n(x))
        expected = y + f(m(y)) if layout.ffn else y
    else:
        y = n(x + a(x))
        expected = m(y + f(y)) if layout.ffn else y
    close(run(block, x), expected, 1e-12)


def test_every_parameter_gets_a_gradient(any_design):
    block = block_of(any_design, qkv_bias=True)
    run(block, torch.randn(2, 7, DIM)).square().sum().backward()
    assert [n for n, p in block.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_deepcopy_pickle_and_state_dict(any_design):
    block = randomised(block_of(any_design, qkv_bias=True))
    x = torch.randn(2, 7, DIM)
    with torch.no_grad():
        expected = run(block, x)
        copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block))]
        fresh = block_of(any_design, qkv_bias=True).eval()
        run(fresh, x)
        fresh.load_state_dict(block.state_dict(), strict=True)
        for other in (*copies, fresh):
            assert torch.equal(run(other, x), expected)
        for p in block.parameters():
            p.mul_(0.5)
        for other in copies:
            assert torch.equal(run(other, x), expected), "a copy shares nothing with the original"
        assert not torch.equal(run(block, x), expected)


def test_autocast(any_design):
    block = block_of(any_design, qkv_bias=True, qk_norm=True)
    x = torch.randn(2, 7, DIM)
    expected = run(block, x)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(block, x)
        out.float().square().sum().backward()
    close(out, expected, 3e-2)
    assert all(p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights(any_design, dtype):
    block = block_of(any_design, qkv_bias=True).eval()
    x = torch.randn(2, 7, DIM)
    expected = run(block, x)
    out = run(block.to(dtype), x.to(dtype))
    assert out.dtype == dtype
    close(out, expected, 4e-2)


def test_device_and_dtype(any_design):
    block = block_of(any_design, device="meta", dtype=torch.bfloat16, init_values=0.1, qk_norm=True)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.bfloat16)}


def test_dropout_and_stochastic_depth(any_design):
    block = block_of(any_design, proj_drop=0.2, drop_path=0.3)
    x = torch.randn(8, 7, DIM)
    assert not torch.equal(run(block, x), run(block, x))
    block.eval()
    assert torch.equal(run(block, x), run(block, x))


def is_sima(any_design):
    return isinstance(formix.design(any_design).mixer, Sima)


def test_causal_does_not_see_the_future(any_design):
    block = randomised(block_of(any_design, qkv_bias=True))
    x = torch.randn(2, 7, DIM)
    if is_sima(any_design):
        with pytest.raises(ValueError, match="cannot be causal"):
            run(block, x, is_causal=True)
        return
    other = torch.cat([x[:, :4], torch.randn(2, 3, DIM)], 1)
    assert torch.equal(run(block, x, is_causal=True)[:, :4], run(block, other, is_causal=True)[:, :4])
    assert not torch.equal(run(block, x, is_causal=True)[:, 4:], run(block, other, is_causal=True)[:, 4:])


def test_padding_is_that_of_the_unpadded_input(any_design):
    block = randomised(block_of(any_design, qkv_bias=True))
    x = torch.randn(2, 7, DIM)
    padded = torch.cat([x, torch.randn(2, 3, DIM)], 1)
    mask = (torch.arange(10) < 7).expand(2, 1, 1, 10)
    close(run(block, padded, attn_mask=mask)[:, :7], run(block, x), 1e-5)


def test_follows_permutations_of_tokens(any_design):
    block = randomised(block_of(any_design, qkv_bias=True))
    x, order = torch.randn(2, 7, DIM), torch.randperm(7)
    close(run(block, x[:, order]), run(block, x)[:, order], 1e-5)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(any_design, backend):
    torch.compiler.reset()
    block = block_of(any_design, qkv_bias=True)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    x = torch.randn(2, 7, DIM)
    out = run(compiled, x)
    close(out, run(block, x), 1e-5)
    names, parameters = zip(*block.named_parameters(), strict=True)
    got = torch.autograd.grad(out.square().sum(), parameters)
    want = torch.autograd.grad(run(block, x).square().sum(), parameters)
    for name, a, b in zip(names, got, want, strict=True):
        close(a, b, 1e-5, f"gradient of {name}", floor=1.0)
    block.eval()
    with torch.no_grad():
        close(run(compiled, x), run(block, x), 1e-5)


@pytest.mark.parametrize("any_layer", [0, 1])
def test_takes_a_layer_of_a_design(any_layer):
    design = formix.design("relu", layers={1: Layout(ffn=False)})
    block = Block(DIM, HEADS, design=design.layer(any_layer, 2))
    assert (block.mlp is None) is (any_layer == 1)
    assert block.layer_design.index == any_layer


def test_a_layer_that_reads_an_earlier_one_needs_it():
    """Without it a loop over a model's blocks would compute another model."""
    with pytest.raises(ValueError, match="Layer 1 reads the keys and values of layer 0 and has been given none"):
        block_of("relu+skip")(torch.randn(2, 7, DIM))


def test_unknown_designs_are_refused():
    with pytest.raises(ValueError, match="'sofmax' is no design"):
        Block(DIM, HEADS, design="sofmax")
    with pytest.raises(ValueError, match="a model of 1 layer has no earlier layer"):
        Block(DIM, HEADS, design="skip")
    assert isinstance(Block(DIM, HEADS).attn.mixer, Softmax)
