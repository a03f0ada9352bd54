"""Activator's unit as a layer."""

import pytest
import torch
from oracles import ACT, close, layer_norm
from torch import nn

import formix
from formix.layers import Block, GatedUnit


def oracle(unit, x):
    def linear(layer, x):
        return torch.einsum("...c,fc->...f", x, layer.weight) + layer.bias

    u, v = ACT[unit.activation](linear(unit.fc1, x)), linear(unit.fc2, x)
    if unit.norm is not None:
        second = unit.norm if unit.norm2 is None else unit.norm2
        u = layer_norm(u, unit.norm.weight, unit.norm.bias, 1e-5)
        v = layer_norm(v, second.weight, second.bias, 1e-5)
    return linear(unit.fc3, u * v)


@pytest.mark.parametrize("options", [{}, {"inner_norm": True}, {"inner_norm": True, "tied": True}], ids=str)
@pytest.mark.parametrize("activation", ACT)
def test_formula(activation, options):
    unit = GatedUnit(6, 10, activation=activation, **options).double()
    for p in unit.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    close(unit(x), oracle(unit, x), 1e-12)


def test_parameters():
    def names(**options):
        return {n for n, _ in GatedUnit(6, 10, **options).named_parameters()}

    plain = {f"fc{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")}
    assert names() == plain
    assert names(inner_norm=True, tied=True) == plain | {"norm.weight", "norm.bias"}
    assert names(inner_norm=True) == plain | {"norm.weight", "norm.bias", "norm2.weight", "norm2.bias"}


@pytest.mark.parametrize(
    "name", ["activator", "activator-glu", "activator(inner_norm=true)", "activator(official=true)"]
)
def test_a_block_mixes_no_tokens(name):
    """The jacobian of a block is zero between different tokens, and masks change nothing."""
    block = Block(6, 2, design=name).double().eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: block(x[None])[0], x).abs().sum((1, 3))  # [5, 5]
    assert torch.equal(jacobian != 0, torch.eye(5, dtype=torch.bool))
    order = torch.randperm(5)
    torch.testing.assert_close(block(x[None, order]), block(x[None])[:, order])
    mask = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    assert torch.equal(block(x[None], attn_mask=mask, is_causal=True), block(x[None]))


@pytest.mark.parametrize("ffn", [True, False], ids=["full", "glu_only"])
def test_official_block(ffn):
    """One LayerNorm before both halves, and one inner LayerNorm for both branches (spec 1a)."""
    design = formix.design("activator" if ffn else "activator-glu", official=True)
    block = Block(6, 2, design=design, norm_layer=nn.LayerNorm).double().eval()
    norms = [n for n, m in block.named_modules() if isinstance(m, nn.LayerNorm)]
    assert norms == ["norm1", "attn.norm"]
    for p in block.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 5, 6, dtype=torch.float64)

    def outer(x):
        return layer_norm(x, block.norm1.weight, block.norm1.bias, 1e-5)

    y = x + oracle(block.attn, outer(x))
    if ffn:
        y = y + block.mlp(outer(y))
    close(block(x), y, 1e-12)


def test_dropout_of_the_output():
    unit = GatedUnit(6, 10, proj_drop=0.5)
    x = torch.randn(2, 50, 6)
    assert (unit(x) == 0).float().mean() > 0.3
    assert torch.equal(unit.eval()(x), unit(x))


def test_refused():
    with pytest.raises(ValueError, match="activation is 'tanh'; it must be one of 'gelu'"):
        GatedUnit(6, 10, activation="tanh")
    with pytest.raises(ValueError, match="inner width is 0 with a model width of 6; choose a larger ratio"):
        Block(6, 2, design="activator(ratio=0.1)")
