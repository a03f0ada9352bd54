"""Blocks compiled by torch.jit.script: the same numbers as the eager blocks, for every design, mask and dtype."""

import pytest
import torch
from oracles import close
from torch import nn

import formix
from formix.layers import Block, BlockStack
from formix.layers.script import ScriptableStack

DIM, HEADS, DEPTH = 24, 3, 3
DESIGNS = [
    *formix.list_designs(),
    "relu+paf+skip",
    "sima(num_heads=1)+parallel",
    "softmax(gate=sigmoid,qk_norm=true)",
    "relu(gate=silu,length=keys)",
    "relu(gate=identity,length=9)",
    "skip(source=fixed(0),heads=[0,2])",
    "activator(official=true)",
    "activator(inner_norm=true,activation=silu)",
]
ACTIVATIONS = ["relu2", "gelu", "gelu_erf", "softplus", "identity", "relu6", "sigmoid", "sigmoid_bias"]
DESIGNS += [f"relu(activation={h},length_exponent={int(h == 'sigmoid_bias') or 0.5})" for h in ACTIVATIONS]


def pair(design, **options):
    chosen = formix.design(design)
    stack = BlockStack(
        *(Block(DIM, HEADS, design=chosen.layer(i, DEPTH), init_values=0.5, **options) for i in range(DEPTH))
    )
    for p in stack.parameters():
        nn.init.normal_(p, mean=0.02, std=0.3)
    return stack.eval(), torch.jit.script(ScriptableStack(stack))


@pytest.mark.parametrize("design", DESIGNS)
def test_the_same_numbers(design):
    stack, scripted = pair(design, qkv_bias=True)
    assert set(scripted.state_dict()) >= set(stack.state_dict())
    scripted, stack, x = scripted.double().eval(), stack.double(), torch.randn(2, 7, DIM, dtype=torch.float64)
    close(scripted(x), stack(x), 1e-12)
    close(scripted(x[:1, :5]), stack(x[:1, :5]), 1e-12)
    half = scripted.to(torch.bfloat16)(x.bfloat16())  # the parameters are those of the eager blocks
    assert half.dtype == torch.bfloat16
    close(half, stack(x.bfloat16()), 0.03)


@pytest.mark.parametrize("design", ["softmax", "relu", "relu(length=keys)", "relu(activation=sigmoid_bias)+skip"])
def test_masks(design):
    stack, scripted = pair(design)
    x, mask = torch.randn(2, 7, DIM), torch.rand(2, 1, 7, 7) > 0.3
    mask[..., 0] = True
    for options in ({"attn_mask": mask}, {"is_causal": True}, {"attn_mask": mask, "is_causal": True}):
        close(scripted(x, **options), stack(x, **options), 1e-5)


def test_what_sima_cannot_have_is_refused():
    _, scripted = pair("sima")
    with pytest.raises(torch.jit.Error, match="takes no mask"):
        scripted(torch.randn(2, 7, DIM), is_causal=True)


@pytest.mark.parametrize("design", ["softmax", "relu", "paf"])
def test_gradients_and_dropout_in_training(design):
    stack, scripted = pair(design)
    x, cotangent = torch.randn(2, 7, DIM), torch.randn(2, 7, DIM)
    expected = torch.autograd.grad(stack(x), list(stack.parameters()), cotangent)
    parameters = dict(scripted.named_parameters())
    given = torch.autograd.grad(scripted(x), [parameters[n] for n, _ in stack.named_parameters()], cotangent)
    for (name, _), a, b in zip(stack.named_parameters(), given, expected, strict=True):
        close(a, b, 1e-4, name)
    _, dropping = pair(design, attn_drop=0.5, drop_path=0.5, proj_drop=0.5)
    assert not torch.equal(dropping.train()(x), dropping(x))
    assert torch.equal(dropping.eval()(x), dropping(x))
