"""`l1_attention` (SimA) against the float64 formula, in all its orders."""

import pytest
import torch
from oracles import close, l1

from formix.ops import l1_attention
from formix.ops.l1 import ORDERS, choose_order

OP = "l1_attention"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in TOLERANCE]
CASES = {  # name -> B, H, Nq, Nk, D, Dv
    "more_tokens_than_channels": (2, 3, 17, 17, 8, 8),
    "fewer_tokens_than_channels": (2, 3, 5, 5, 16, 16),
    "more_keys": (2, 3, 4, 19, 8, 8),
    "more_queries": (2, 3, 19, 4, 8, 8),
    "one_token": (2, 3, 1, 1, 8, 8),
    "one_query": (2, 3, 1, 9, 8, 8),
    "head_size_1": (2, 3, 9, 9, 1, 1),
    "head_size_13": (2, 3, 9, 9, 13, 13),
    "wider_values": (2, 3, 9, 9, 8, 21),
    "narrower_values": (2, 3, 9, 9, 8, 3),
    "long": (1, 1, 300, 300, 16, 16),
    "batch_0": (0, 3, 9, 9, 8, 8),
    "no_heads": (2, 0, 9, 9, 8, 8),
    "no_queries": (2, 3, 0, 5, 8, 8),
    "no_keys": (2, 3, 5, 0, 8, 8),
}


def qkv(case, dtype=torch.float64):
    b, h, n, m, d, dv = CASES[case]
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in ((b, h, n, d), (b, h, m, d), (b, h, m, dv))]


def padding_for(key):
    mask = torch.rand(key.shape[0], key.shape[2]) > 0.4
    mask[:, :1] = True
    return mask


def check(inputs, arguments, impl, tolerance):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = l1_attention(*inputs, impl=impl, **arguments)
    assert out.dtype == inputs[0].dtype
    weight = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, inputs, weight)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = l1(*exact, **{k: v for k, v in arguments.items() if k != "order"})
    expected_gradients = torch.autograd.grad(expected, exact, weight.double())
    close(out, expected, tolerance)
    floor = 0.1
    if out.shape[2] == 1 and out.numel():  # q / |q| is a sign: a gradient of 0, the difference of terms in 1 / |q|
        floor = (1 / inputs[0].abs()).max().item()
    for name, got, want in zip(("query", "key", "value"), gradients, expected_gradients, strict=True):
        close(got, want, tolerance, f"gradient of {name}", floor)


def orders_of(impl):
    return ORDERS if impl == "reference" else ("auto", "fused")


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(case, dtype, padded, impl):
    inputs = qkv(case, dtype)
    mask = padding_for(inputs[1]) if padded else None
    for order in orders_of(impl):
        check(inputs, {"order": order, "key_padding_mask": mask}, impl, TOLERANCE[dtype])


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_equals_the_formula_in_float64(order):
    for case in CASES:
        inputs = qkv(case)
        check(inputs, {"order": order, "key_padding_mask": padding_for(inputs[1])}, "reference", 1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_of_gradients(order):
    inputs = [torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[True, True, False, True]])

    def attention(*x):
        return l1_attention(*x, order=order, key_padding_mask=mask, impl="reference")

    assert torch.autograd.gradcheck(attention, inputs)
    assert torch.autograd.gradgradcheck(attention, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_packed_projection(dtype, impl):
    packed = torch.randn(2, 9, 3, 3, 8, dtype=torch.float64).to(dtype)
    views = packed.permute(2, 0, 3, 1, 4).unbind(0)
    check(views, {}, impl, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_leaves_the_result_of_the_unpadded_input(dtype, impl):
    """On the tokens the same numbers, on the padding zeros, whatever the padding holds, gradients included."""
    inputs = qkv("more_tokens_than_channels", dtype)
    n, extra = inputs[0].shape[2], 6
    plain = [x.clone().requires_grad_() for x in inputs]
    padded = [torch.cat([x, 1e3 * torch.ones_like(x[:, :, :extra])], 2).requires_grad_() for x in inputs]
    mask = (torch.arange(n + extra) < n).expand(2, -1)
    for order in orders_of(impl):
        expected = l1_attention(*plain, order=order, impl=impl)
        out = l1_attention(*padded, key_padding_mask=mask, order=order, impl=impl)
        tolerance = 1e-6 if dtype == torch.float32 else TOLERANCE[dtype]
        close(out[:, :, :n], expected, tolerance)
        assert torch.equal(out[:, :, n:], torch.zeros_like(out[:, :, n:]))
        weight = torch.randn_like(expected)
        want = torch.autograd.grad(expected, plain, weight)
        got = torch.autograd.grad(out[:, :, :n], padded, weight)
        for a, b in zip(got, want, strict=True):
            close(a[:, :, :n], b, tolerance)
            assert not a[:, :, n:].any()


def test_a_batch_element_that_is_all_padding_gives_zero(impl):
    inputs = qkv("more_tokens_than_channels", torch.float32)
    mask = torch.tensor([[True] * 17, [False] * 17])
    out = l1_attention(*inputs, key_padding_mask=mask, impl=impl)
    assert not out[1].any()
    close(out[:1], l1(*(x[:1].double() for x in inputs)), 1e-5)


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-30])
def test_a_channel_of_zeros_stays_zero(eps, impl):
    if impl != "reference" and eps < 1e-18:
        with pytest.raises(ValueError, match="must not leave float32's range"):
            l1_attention(*qkv("one_token", torch.float32), eps=eps, impl=impl)
        return
    q, k, v = qkv("more_tokens_than_channels", torch.float32)
    q[..., 2] = k[..., 2] = 0
    k[..., 5] = 0
    for order in orders_of(impl):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = l1_attention(*leaves, order=order, eps=eps, impl=impl)
        rest = [i for i in range(8) if i not in (2, 5)]
        close(out, l1(q[..., rest].double(), k[..., rest].double(), v.double()), 1e-5)
        if eps > 1e-20:  # below, 1 / eps is the gradient and leaves float32's range
            out.sum().backward()
            assert all(x.grad.isfinite().all() for x in leaves)


def test_eps_is_a_lower_bound_and_is_not_added(impl):
    q, k, v = qkv("more_tokens_than_channels", torch.float32)
    close(l1_attention(q, k, v, eps=0.5, impl=impl), l1(q.double(), k.double(), v.double()), 1e-5)
    small = l1_attention(q * 1e-3, k, v, eps=0.5, impl=impl)  # norms of q are below 0.5
    close(small, l1(q.double() * 1e-3, k.double(), v.double(), eps=0.5), 1e-5)
    assert (q * 1e-3).abs().sum(2).max() < 0.5


def test_norms_are_over_tokens(impl):
    """Scaling a channel of the queries or keys changes nothing; scaling the values scales the result."""
    q, k, v = qkv("more_tokens_than_channels", torch.float32)
    out = l1_attention(q, k, v, impl=impl)
    scales = torch.rand(8) + 0.1
    close(l1_attention(q * scales, k / scales * 7, v, impl=impl), out, 1e-5)
    close(l1_attention(q, k, 3 * v, impl=impl), 3 * out, 1e-5)


@pytest.mark.parametrize(
    ("n", "m", "d", "dv", "order"),
    [
        pytest.param(197, 197, 64, 64, "fused", id="vit_224"),
        pytest.param(50, 50, 64, 64, "qk_v", id="vit_224_patch_32"),
        pytest.param(64, 64, 64, 64, "fused", id="as_many_tokens_as_channels"),
        pytest.param(63, 63, 64, 64, "qk_v", id="one_token_less"),
        pytest.param(197, 197, 384, 384, "qk_v", id="single_head"),
        pytest.param(1, 4096, 64, 64, "qk_v", id="one_query"),
        pytest.param(196, 49, 64, 64, "fused", id="strided_keys"),
    ],
)
def test_the_order_is_chosen_from_the_shapes(n, m, d, dv, order):
    q, k, v = (torch.empty(1, 1, *shape, device="meta") for shape in ((n, d), (m, d), (m, dv)))
    assert choose_order(q, k, v) == order
    cost = {"qk_v": n * m * (d + dv), "fused": (n + m) * d * dv}
    assert cost[order] == min(cost.values())


def test_autocast_computes_in_its_type(impl):
    q, k, v = qkv("more_tokens_than_channels", torch.float32)
    with torch.autocast(q.device.type, torch.bfloat16):
        out = l1_attention(q, k, v.bfloat16(), impl=impl)
    assert out.dtype == torch.bfloat16
    close(out, l1(*(x.bfloat16().double() for x in (q, k, v))), 4e-3)


X = torch.zeros(2, 3, 5, 4)
REFUSED = {
    "order": ((X, X, X), {"order": "kqv"}, "order is 'kqv'"),
    "eps_0": ((X, X, X), {"eps": 0.0}, "eps is 0.0"),
    "eps_nan": ((X, X, X), {"eps": float("nan")}, "eps is nan"),
    "eps_word": ((X, X, X), {"eps": "small"}, "eps is 'small'"),
    "float_mask": ((X, X, X), {"key_padding_mask": torch.ones(2, 5)}, "boolean mask"),
    "mask_shape": ((X, X, X), {"key_padding_mask": torch.ones(2, 4, dtype=torch.bool)}, r"\[B, Nk\] = \[2, 5\]"),
    "mask_list": ((X, X, X), {"key_padding_mask": [True]}, "key_padding_mask is a list"),
    "mask_device": ((X, X, X), {"key_padding_mask": torch.ones(2, 5, device="meta").bool()}, "mask on meta"),
    "two_dtypes": ((X, X.half(), X), {}, "must be the same"),
    "heads": ((X, X[:, :1], X[:, :1]), {}, "3 heads, key 1"),
    "sparse": ((X, X.to_sparse(), X), {}, r"key has layout torch\.sparse_coo; .* to_dense"),
    "mkldnn": ((X.to_mkldnn(), X, X), {}, r"query has layout torch\._mkldnn"),
    "sparse_mask": (
        (X, X, X),
        {"key_padding_mask": torch.ones(2, 5).bool().to_sparse()},
        "key_padding_mask has layout",
    ),
    "impl": ((X, X, X), {"impl": "fast"}, "impl is 'fast'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    inputs, arguments, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        l1_attention(*inputs, **arguments)


def test_has_no_causal_form():
    with pytest.raises(TypeError, match="is_causal"):
        l1_attention(X, X, X, is_causal=True)


@pytest.mark.parametrize("order", ["qk_v", "q_kv", "fused"])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_queries_and_keys_does_not_matter(order, size):
    q, k, v = torch.randn(3, 1, 2, 40, 8).unbind(0)
    expected = l1_attention(q, k, v, order=order, impl="reference", eps=1e-37)
    found = l1_attention(q * size, k * size, v * size, order=order, impl="reference", eps=1e-37) / size
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("order", ["qk_v", "q_kv", "fused"])
def test_the_parts_of_a_gradient_may_be_too_large_for_float16(order):
    """Of one query and one key, Q^ and K^ are signs: gradients of 0, the difference of two parts of 1e6."""
    q, k, v = torch.full((3, 1, 1, 1, 1), 1e-4, dtype=torch.float16).unbind(0)
    q.requires_grad_()
    k.requires_grad_()
    l1_attention(q, k, v + 100, order=order, impl="reference").backward(torch.ones_like(v))
    assert q.grad.item() == k.grad.item() == 0


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_large_numbers(dtype, impl):
    """Sums of products of keys and values and of queries and the gradient beyond float32's range, and a norm whose
    reciprocal is subnormal; more tokens than one program of a GPU sums."""
    q, k, v = (torch.randn(1, 1, 1100, 8).to(dtype) for _ in range(3))
    q, k, v = q * 1e30, k * 1e20, v * 1e20
    k[:, :, 1, 2] = q[:, :, 1090, 3] = 2e38
    inputs = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = l1_attention(*inputs, order="fused", impl=impl), l1(*exact)
    close(out, expected, 3 * TOLERANCE[dtype])
    if impl == "reference":  # autograd squares the norm
        return
    weight = torch.randn_like(out) * 1e10
    gradients = torch.autograd.grad(out, inputs, weight)
    wanted = torch.autograd.grad(expected, exact, weight.double())
    for got, want in zip(gradients, wanted, strict=True):
        close(got, want, 3 * TOLERANCE[dtype], floor=0)
