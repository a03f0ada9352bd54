"""What must hold for any input: hypothesis looks for one where it does not."""

import hypothesis.strategies as st
import torch
from hypothesis import given
from oracles import H, close

from formix.ops import gated_unit, l1_attention, pointwise_attention, skip_layer_attention

TOLERANCE = 1e-5
ACTIVATIONS = st.sampled_from([*H, "sigmoid_bias"])
SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 10_000)


@st.composite
def qkv(draw, cross=True):
    """float32 query, key and value of any small shape."""
    torch.manual_seed(draw(SEEDS))
    b, h, d, dv, n = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(SIZES), draw(SIZES), draw(SIZES)
    m = draw(SIZES) if cross else n
    return torch.randn(b, h, n, d), torch.randn(b, h, m, d), torch.randn(b, h, m, dv)


@given(qkv(), ACTIVATIONS)
def test_pointwise_follows_permutations_of_queries_and_ignores_those_of_keys(x, activation):
    q, k, v = x
    rows, columns = torch.randperm(q.shape[2]), torch.randperm(k.shape[2])
    out = pointwise_attention(q, k, v, activation=activation)
    permuted = pointwise_attention(q[:, :, rows], k[:, :, columns], v[:, :, columns], activation=activation)
    close(permuted, out[:, :, rows], TOLERANCE)


@given(qkv(), st.sampled_from(["qk_v", "q_kv", "fused", "auto"]))
def test_l1_follows_permutations_of_queries_and_ignores_those_of_keys(x, order):
    q, k, v = x
    rows, columns = torch.randperm(q.shape[2]), torch.randperm(k.shape[2])
    out = l1_attention(q, k, v, order=order)
    close(l1_attention(q[:, :, rows], k[:, :, columns], v[:, :, columns], order=order), out[:, :, rows], TOLERANCE)


@given(qkv(), ACTIVATIONS, st.integers(1, 8), st.sampled_from([0.0, 0.5, 1.0]))
def test_pointwise_padding_changes_nothing(x, activation, extra, exponent):
    q, k, v = x
    exponent = 1.0 if activation == "sigmoid_bias" else exponent
    long = [torch.cat([t, 50 * torch.randn(*t.shape[:2], extra, t.shape[3])], 2) for t in (k, v)]
    mask = torch.arange(k.shape[2] + extra) < k.shape[2]
    arguments = {"activation": activation, "length_exponent": exponent}
    close(
        pointwise_attention(q, *long, attn_mask=mask, **arguments), pointwise_attention(q, k, v, **arguments), TOLERANCE
    )


@given(qkv(cross=False), st.integers(1, 8))
def test_l1_padding_changes_nothing(x, extra):
    n = x[0].shape[2]
    padded = [torch.cat([t, 50 * torch.randn(*t.shape[:2], extra, t.shape[3])], 2) for t in x]
    mask = (torch.arange(n + extra) < n).expand(x[0].shape[0], -1)
    out = l1_attention(*padded, key_padding_mask=mask)
    close(out[:, :, :n], l1_attention(*x), TOLERANCE)
    assert not out[:, :, n:].any()


@given(qkv(), ACTIVATIONS, st.data())
def test_causal_pointwise_does_not_see_the_future(x, activation, data):
    q, k, v = x
    i = data.draw(st.integers(0, q.shape[2] - 1))
    future = torch.arange(k.shape[2]) > i
    other_k, other_v = (torch.where(future[:, None], 99.0, t) for t in (k, v))
    out, other = (
        pointwise_attention(q, *kv, activation=activation, is_causal=True) for kv in ((k, v), (other_k, other_v))
    )
    assert torch.equal(out[:, :, : i + 1], other[:, :, : i + 1])


@given(qkv(), ACTIVATIONS, st.data())
def test_pointwise_over_chunks_of_keys_sums_to_the_whole(x, activation, data):
    q, k, v = x
    cut = data.draw(st.integers(0, k.shape[2]))
    arguments = {"activation": activation, "length": k.shape[2]}
    whole = pointwise_attention(q, k, v, **arguments)
    parts = [pointwise_attention(q, k[:, :, s], v[:, :, s], **arguments) for s in (slice(cut), slice(cut, None))]
    close(parts[0] + parts[1], whole, TOLERANCE)


@given(qkv())
def test_l1_over_chunks_of_queries_needs_only_the_norms(x):
    """Q diag(c) K^T V: the same product serves any subset of the queries once c is known."""
    q, k, v = x
    doubled = torch.cat([q, q], 2)  # twice the norm of every channel
    close(l1_attention(doubled, k, v)[:, :, : q.shape[2]], l1_attention(q, k, v) / 2, TOLERANCE)


@given(qkv(), ACTIVATIONS)
def test_pointwise_is_linear_in_the_values(x, activation):
    q, k, v = x
    other = torch.randn_like(v)
    together = pointwise_attention(q, k, 2 * v - 3 * other, activation=activation)
    apart = [pointwise_attention(q, k, t, activation=activation) for t in (v, other)]
    close(together, 2 * apart[0] - 3 * apart[1], TOLERANCE, floor=1.0)


@given(qkv(), st.sampled_from(["softmax", "pointwise"]), st.data())
def test_skip_wiring_follows_permutations_of_heads(x, mixer, data):
    q, k, v = x
    source = torch.randn_like(k), torch.randn_like(v)
    h = q.shape[1]
    heads = data.draw(st.sets(st.integers(0, h - 1)))
    order = data.draw(st.permutations(range(h)))
    out = skip_layer_attention(q, k, v, *source, skip_heads=sorted(heads), mixer=mixer)
    moved = [order.index(i) for i in heads]  # head i stands at order.index(i) after the permutation
    permuted = skip_layer_attention(*(t[:, order] for t in (q, k, v, *source)), skip_heads=moved, mixer=mixer)
    close(permuted, out[:, order], TOLERANCE)


@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.sampled_from(["gelu", "silu", "relu", "sigmoid", "identity"]))
def test_gated_unit_follows_permutations_of_tokens(seed, n, c, activation):
    torch.manual_seed(seed)
    x, w1, w2, w3 = torch.randn(2, n, c), torch.randn(2 * c, c), torch.randn(2 * c, c), torch.randn(c, 2 * c)
    order = torch.randperm(n)

    def unit(x):
        return gated_unit(x, w1, None, w2, None, w3, None, activation=activation)

    close(unit(x[:, order]), unit(x)[:, order], TOLERANCE)
