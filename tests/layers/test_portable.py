"""The forms of the mixers for other runtimes: the same numbers, PyTorch's operators alone."""

import pytest
import torch
import torch.nn.functional as F
from oracles import close

from formix.design import Pointwise, Sima, Softmax
from formix.layers import attend
from formix.ops import l1_attention, pointwise_attention
from formix.ops.l1 import choose_order
from formix.ops.registry import is_portable, portable

MASKS = {
    "none": None,
    "padding": torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]).bool()[:, None, None],
    "no keys": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()[:, None, None],
}


def qkv(heads=4, kv_heads=2):
    return torch.randn(2, heads, 5, 8), torch.randn(2, kv_heads, 5, 8), torch.randn(2, kv_heads, 5, 8)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("mixer", "causal"),
    [(Softmax(), False), (Softmax(), True), (Pointwise(), False), (Pointwise(), True), (Sima(), False)],
    ids=str,
)
def test_the_numbers_are_the_same(mixer, causal, mask):
    q, k, v = qkv()
    expected = attend(mixer, q, k, v, attn_mask=MASKS[mask], is_causal=causal)
    with portable():
        found = attend(mixer, q, k, v, attn_mask=MASKS[mask], is_causal=causal)
    close(found, expected, 1e-5)


def test_softmax_takes_additive_masks_and_biases():
    q, k, v = qkv(kv_heads=4)
    visible = MASKS["no keys"].expand(2, 1, 5, 5)
    additive = torch.zeros(2, 1, 5, 5).masked_fill(~visible, float("-inf"))
    bias = torch.randn(1, 4, 5, 5)
    with portable():
        masked = attend(Softmax(), q, k, v, attn_mask=additive)
        biased = attend(Softmax(), q, k, v, attn_bias=bias)
    assert (masked[1] == 0).all()
    close(masked[0], F.scaled_dot_product_attention(q, k, v)[0], 1e-6)
    close(biased, F.scaled_dot_product_attention(q, k, v, attn_mask=bias), 1e-6)


def test_auto_is_the_reference_inside_and_nowhere_else():
    q, k, v = qkv(kv_heads=4)
    with portable():
        assert is_portable()
        assert torch.equal(pointwise_attention(q, k, v), pointwise_attention(q, k, v, impl="reference"))
        assert torch.equal(l1_attention(q, k, v), l1_attention(q, k, v, impl="reference"))
    assert not is_portable()


def test_a_program_for_any_number_of_tokens_has_one_order():
    """5 tokens of 8 channels would be "qk_v" by the count of products, 50 "fused"."""
    q, k, v = qkv(kv_heads=4)
    assert choose_order(q, k, v) == "qk_v"

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return l1_attention(q, k, v)

    tokens = torch.export.Dim("tokens", min=1, max=1000)
    with portable():
        exported = torch.export.export(Attention(), (q, k, v), dynamic_shapes=[{2: tokens}] * 3)
    longer = [torch.randn(2, 4, 50, 8) for _ in range(3)]
    for inputs in ([q, k, v], longer):
        close(exported.module()(*inputs), l1_attention(*inputs, order="fused"), 1e-5)
