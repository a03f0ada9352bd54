"""The CPU kernels, on every instruction set of this machine, against the float64 formulas: output and each gradient by
name, and as operators of PyTorch (compile, export, autocast, second derivatives)."""

import functools
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import H, close, l1, pointwise
from torch import func
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from formix.ops import l1_attention, native, native_library, pointwise_attention

usable, reason = native.available()
pytestmark = pytest.mark.skipif(not usable, reason=reason)

ISAS = [name for name, why in native.isas().items() if not why]
ACTIVATIONS = [*H, "sigmoid_bias"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in TOLERANCE]


@pytest.fixture(params=ISAS)
def isa(request):
    native.set_isa(request.param)
    yield request.param
    native.set_isa("auto")


@pytest.fixture(params=[1, 3], ids=["one_thread", "three_threads"])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def packed(b, h, n, d, dtype, parts=1):
    """`parts` tensors [b, h, n, d], views of one [b, n, parts, h, d], of odd sixteenths: scores are exact then in every
    precision and order of summation, so that none falls on another side of relu's kink than the oracle's."""
    memory = ((torch.randn(b, n, parts, h, d, dtype=torch.float64) * 8).floor() / 8 + 1 / 16).to(dtype)
    return list(memory.permute(2, 0, 3, 1, 4).unbind(0))


def qkv(b=2, h=2, n=40, m=None, d=16, dv=None, hkv=None, dtype=torch.float32):
    m, dv, hkv = n if m is None else m, dv or d, hkv or h
    if (h, n, d) == (hkv, m, dv):
        return packed(b, h, n, d, dtype, 3)
    return [packed(b, h, n, d, dtype)[0], packed(b, hkv, m, d, dtype)[0], packed(b, hkv, m, dv, dtype)[0]]


def check(operator, oracle, inputs, tolerance, floor=1e-2, **options):
    """Output and gradients of `operator` against those of `oracle` in float64; errors of gradients are relative to the
    largest, or to `floor`."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = operator(*inputs, **options), oracle(*exact, **options)
    close(out, expected, tolerance, floor=floor / 10)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, inputs, grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for name, a, e in zip(("query", "key", "value"), actual, wanted, strict=True):
        assert a.dtype == out.dtype
        close(a, e, 3 * tolerance, f"gradient of {name}", floor)


def bits(*shape):
    return torch.rand(shape) > 0.4


def blind():
    mask = bits(2, 2, 40, 40)
    mask[0, 1, 3:5] = mask[1, :, 39] = False
    return mask


# name -> (shapes, options). The options are made in the test, after the seed.
CASES = {
    "self": ({}, dict),
    "one_token": ({"b": 1, "h": 1, "n": 1, "d": 1}, dict),
    "tall": ({"n": 70, "m": 9}, dict),
    "wide": ({"n": 5, "m": 90}, dict),
    "197_tokens": ({"b": 1, "n": 197, "d": 64}, dict),
    "odd_everything": ({"b": 1, "n": 61, "m": 67, "d": 7, "dv": 21}, dict),
    "head_size_256": ({"b": 1, "h": 1, "n": 33, "d": 256}, dict),
    "head_size_1": ({"d": 1}, dict),
    "more_than_the_cache_holds": ({"b": 2, "h": 20, "n": 150, "d": 128}, dict),
    "several_key_blocks": ({"b": 1, "h": 1, "n": 50, "m": 900, "d": 33}, dict),
    "causal": ({"n": 131}, lambda: {"is_causal": True}),
    "causal_tall": ({"n": 70, "m": 40}, lambda: {"is_causal": True}),
    "causal_wide": ({"n": 40, "m": 70}, lambda: {"is_causal": True}),
    "causal_several_blocks": ({"b": 1, "h": 1, "n": 801, "d": 8}, lambda: {"is_causal": True}),
    "key_padding": ({}, lambda: {"attn_mask": bits(2, 1, 1, 40)}),
    "prefix_padding": ({}, lambda: {"attn_mask": torch.arange(40) < torch.tensor([7, 33])[:, None, None, None]}),
    "no_key": ({}, lambda: {"attn_mask": torch.zeros(40, dtype=torch.bool)}),
    "mask_by_query": ({}, lambda: {"attn_mask": bits(40, 1)}),
    "full_mask": ({}, lambda: {"attn_mask": bits(2, 2, 40, 40)}),
    "strided_mask": ({}, lambda: {"attn_mask": bits(40, 40).t()}),
    "blind_rows": ({}, lambda: {"attn_mask": blind()}),
    "causal_mask": ({}, lambda: {"attn_mask": bits(2, 1, 40, 40), "is_causal": True}),
    "causal_padding": ({}, lambda: {"attn_mask": bits(2, 1, 1, 40), "is_causal": True}),
    "grouped": ({"h": 6, "hkv": 2}, dict),
    "grouped_causal_mask": ({"h": 4, "hkv": 1}, lambda: {"attn_mask": bits(2, 4, 40, 40), "is_causal": True}),
    "fixed_length": ({}, lambda: {"length": 5}),
    "square_root": ({}, lambda: {"length_exponent": 0.5, "is_causal": True}),
    "negative_scale": ({}, lambda: {"scale": -0.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_pointwise_cases(isa, threads, case):
    shapes, options = CASES[case]
    for activation, dtype in (("relu", torch.float32), ("softplus", torch.float32), ("gelu", torch.bfloat16)):
        inputs = qkv(**shapes, dtype=dtype)
        check(native.pointwise_attention, pointwise, inputs, TOLERANCE[dtype], activation=activation, **options())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pointwise_activations(isa, activation, dtype):
    for options in ({}, {"is_causal": True, "attn_mask": bits(2, 1, 1, 37)}):
        length_exponent = 0.0 if activation == "sigmoid_bias" else 1.0
        check(
            native.pointwise_attention,
            pointwise,
            qkv(n=37, d=24, dtype=dtype),
            TOLERANCE[dtype],
            activation=activation,
            length_exponent=length_exponent,
            **options,
        )


@pytest.mark.parametrize("activation", list(H))
def test_activation_over_the_whole_range(isa, activation):
    """One key of one channel with value 1 makes the operator h itself, and its query gradient h'."""
    steps = torch.cat([torch.linspace(-200, 200, 40001), torch.logspace(-30, 15, 400), -torch.logspace(-30, 15, 400)])
    s = steps.view(1, 1, -1, 1).requires_grad_()
    one = torch.ones(1, 1, 1, 1)
    out = native.pointwise_attention(s, one, one, activation=activation, scale=1.0)
    (slope,) = torch.autograd.grad(out.sum(), s)
    exact = s.detach().double().requires_grad_()
    functions = {**H, "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh")}  # no cancellation at -6
    expected = functions[activation](exact)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    error = (out.double() - expected).abs() / expected.abs().clamp(min=1)
    assert error.max() < 3e-7
    clear = exact.detach().abs() > 1e-12  # at 0 relu's derivative is a convention
    slope_error = ((slope.double() - expected_slope).abs() / expected_slope.abs().clamp(min=1))[clear]
    assert slope_error.max() < 2e-6


@pytest.mark.parametrize("activation", list(H))
def test_activation_in_bfloat16(isa, activation):
    """As above in bfloat16, whose weights the kernels may approximate to 4e-4, and slopes to 1e-3, plus rounding."""
    s = torch.cat([torch.linspace(-40, 40, 20001), torch.logspace(-20, 10, 200), -torch.logspace(-20, 10, 200)])
    s = s.bfloat16().view(1, 1, -1, 1).requires_grad_()
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    for scale in (1.0, 0.3, -1.0):
        out = native.pointwise_attention(s, one, one, activation=activation, scale=scale)
        (slope,) = torch.autograd.grad(out.sum(), s)
        exact = s.detach().double().requires_grad_()
        expected = H[activation](exact * scale)
        (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
        assert ((out.double() - expected).abs() <= 4e-4 + 2**-7 * expected.abs()).all()
        clear = (exact.detach() * scale).abs() > 1e-12
        if activation == "relu6":
            clear &= ((exact.detach() * scale) - 6).abs() > 1e-3
        assert ((slope.double() - expected_slope).abs() <= 1e-3 + 2**-7 * expected_slope.abs())[clear].all()
    for infinite, limit in ((-math.inf, {"identity": -math.inf}.get(activation, 0.0)), (math.inf, math.inf)):
        limit = {"sigmoid": 1.0, "relu6": 6.0}.get(activation, limit) if infinite > 0 else limit
        out = native.pointwise_attention(one * infinite, one, one, activation=activation, scale=1.0)
        assert out.item() == pytest.approx(limit, abs=1e-30)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_biased_sigmoid_of_long_sequences(isa, dtype):
    """Its weights are about 1 / L, far below what is lost of the others' in bfloat16."""
    for length in (1000, 65536):
        options = {"activation": "sigmoid_bias", "length_exponent": 0.0, "length": length}
        check(native.pointwise_attention, pointwise, qkv(n=96, dtype=dtype), TOLERANCE[dtype], floor=0, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_hidden(isa, activation):
    q, k, v = qkv(b=1, h=1, n=20)
    q[0, 0, 3] = math.nan
    out = native.pointwise_attention(q, k, v, activation=activation)
    assert out[0, 0, 3].isnan().all()
    assert out[0, 0, [0, 1, 2, *range(4, 20)]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="self"),
        pytest.param({"b": 1, "h": 1, "n": 5, "d": 2}, id="five_tokens"),
        pytest.param({"n": 33, "m": 70, "d": 7, "dv": 19}, id="odd_cross"),
        pytest.param({"b": 1, "h": 1, "n": 1500, "d": 48}, id="one_long_head"),
        pytest.param({"b": 3, "h": 3, "n": 1100, "m": 1300, "d": 24}, id="three_long_sequences"),
        pytest.param({"b": 3, "h": 3, "n": 120, "d": 64}, id="three_short_sequences"),
        pytest.param({"b": 1, "h": 1, "n": 30, "d": 256}, id="head_size_256"),
    ],
)
def test_l1(isa, threads, shape, dtype):
    for masked in (False, True):
        q, k, v = qkv(**shape, dtype=dtype)
        mask = bits(q.shape[0], k.shape[2]) if masked else None
        # the size of the output shrinks with the number of tokens
        check(native.l1_attention, l1, [q, k, v * 10], TOLERANCE[dtype] * 2, key_padding_mask=mask)


def test_l1_zero_channel(isa):
    q, k, v = qkv()
    q[..., 3] = 0
    check(native.l1_attention, l1, [q, k, v], 1e-5)


# Sizes of queries, keys, values and the output's gradient; products of them over the tokens leave float32's range.
LARGE = {
    "keys_and_values": (1, 1e20, 1e30, 1),
    "queries_and_keys": (1e30, 1e30, 1e3, 1),
    "queries_and_the_gradient": (1e25, 1, 1, 1e20),
    "everything": (1e30, 1e30, 1e10, 1e10),
}


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("sizes", LARGE)
def test_l1_of_large_numbers(isa, threads, sizes, dtype):
    for shape in ({"n": 50, "d": 24}, {"b": 1, "n": 1100, "d": 24, "dv": 9}):
        for masked in (False, True):
            factors = LARGE[sizes]
            x = [(x * size).requires_grad_() for x, size in zip(qkv(**shape, dtype=dtype), factors, strict=False)]
            exact = [t.detach().double().requires_grad_() for t in x]
            mask = bits(x[0].shape[0], x[0].shape[2]) if masked else None
            out = native.l1_attention(*x, key_padding_mask=mask)
            expected = l1(*exact, key_padding_mask=mask)
            grad = torch.randn_like(out) * factors[3]
            actual = torch.autograd.grad(out, x, grad)
            wanted = torch.autograd.grad(expected, exact, grad.double())
            names = ("output", "gradient of query", "gradient of key", "gradient of value")
            for name, a, e in zip(names, (out, *actual), (expected, *wanted), strict=True):
                close(a, e, 3 * TOLERANCE[dtype], name, 0)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_l1_at_the_end_of_the_range(isa, dtype):
    """A norm of 2e38 is all of one token; its reciprocal is subnormal."""
    q, k, v = qkv(b=1, h=1, n=50, d=24, dtype=dtype)
    q[:, :, 1], k[:, :, 2] = 2e38, -2e38
    expected = l1(q.double(), k.double(), v.double())
    close(native.l1_attention(q, k, v), expected, TOLERANCE[dtype], floor=0)
    grad = torch.randn_like(v)
    (actual,) = torch.autograd.grad(native.l1_attention(q, k, v.requires_grad_()), v, grad)
    exact = v.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(l1(q.double(), k.double(), exact), exact, grad.double())
    close(actual, wanted, TOLERANCE[dtype], floor=0)


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_l1_of_infinite_numbers(isa, number):
    for which in range(3):
        x = qkv(b=1, h=2, n=20, d=8)
        x[which] = x[which].clone()
        x[which][0, 0, 3, 2] = number
        out, expected = native.l1_attention(*x), l1_attention(*x, impl="reference")
        assert not out[0, 0].isfinite().all()
        torch.testing.assert_close(out.isfinite(), expected.isfinite())
        close(out[0, 1], expected[0, 1], 1e-5)


def test_inputs_are_not_copied_and_output_is_in_token_order(isa):
    q, k, v = qkv(b=2, h=3, n=10, d=16)
    for out in (native.pointwise_attention(q, k, v), native.l1_attention(q, k, v)):
        assert out.shape == (2, 3, 10, 16)
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("n", [0, 3])
def test_empty(isa, n):
    q, k, v = torch.randn(2, 2, 3 - n, 8), torch.randn(2, 2, n, 8), torch.randn(2, 2, n, 8)
    assert torch.equal(native.pointwise_attention(q, k, v), torch.zeros(2, 2, 3 - n, 8))


def test_gradient_of_a_broadcast_output_gradient(isa):
    q, k, v = (x.requires_grad_() for x in qkv(d=8))
    native.pointwise_attention(q, k, v).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    pointwise(*exact).sum().backward()
    close(q.grad, exact[0].grad, 1e-5)


def inputs64():
    return [x.detach().requires_grad_() for x in qkv(b=1, h=2, n=9, d=8)]


OPERATORS = {
    "pointwise": lambda q, k, v: native.pointwise_attention(q, k, v, activation="gelu", is_causal=True),
    "l1": lambda q, k, v: native.l1_attention(q, k, v, key_padding_mask=torch.arange(q.shape[2])[None] < 7),
}
ORACLES = {
    "pointwise": lambda q, k, v: pointwise(q, k, v, activation="gelu", is_causal=True),
    "l1": lambda q, k, v: l1(q, k, v, key_padding_mask=torch.arange(q.shape[2])[None] < 7),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives(name):
    tensors = inputs64()
    exact = [x.detach().double().requires_grad_() for x in tensors]
    results = []
    for f, x in ((OPERATORS[name], tensors), (ORACLES[name], exact)):
        out = f(*x)
        first = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), x))
    for which, a, e in zip(("query", "key", "value"), *results, strict=True):
        close(a, e, 1e-4, f"second derivative by {which}")


@pytest.mark.parametrize("name", ["pointwise_attention", "l1_attention"])
def test_operator_registration(name):
    q, k, v = inputs64()
    mask = {"pointwise_attention": bits(9, 9), "l1_attention": bits(1, 9)}[name]
    rest = {"pointwise_attention": ("gelu", 1.0, None, True, 0.3), "l1_attention": (1e-12,)}[name]
    op = getattr(torch.ops.formix, name).default
    torch.library.opcheck(op, (q, k, v, mask, *rest))
    torch.library.opcheck(op, (q, k, v, None, *rest))


@pytest.mark.parametrize("name", OPERATORS)
def test_compile_fullgraph(name):
    f = OPERATORS[name]
    compiled = torch.compile(lambda q, k, v: f(q * 2, k, v).sum(), fullgraph=True, backend="aot_eager")
    a, b = inputs64(), inputs64()
    b = [x.detach().clone().requires_grad_() for x in a]
    compiled(*a).backward()
    f(b[0] * 2, b[1], b[2]).sum().backward()
    for x, y in zip(a, b, strict=True):
        close(x.grad, y.grad, 1e-6)


def one_by_one(f):
    """`f` of [B, H, N, D] for the batch's entries by themselves."""
    return lambda *x: f(*(t[None] for t in x))[0]


def forward_mode(f, q, k, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(q, q.cos()), k, v)).tangent


def square(f):
    return lambda *x: f(*x).square().sum()


TRANSFORMS = {
    "grad": lambda f, *x: func.grad(square(f), (0, 1, 2))(*x),
    "vjp": lambda f, *x: func.vjp(f, *x)[1](x[0].cos()),
    "jvp": lambda f, *x: func.jvp(f, x, tuple(t.cos() for t in x)),
    "jacrev": lambda f, *x: func.jacrev(f)(*x),
    "jacfwd": lambda f, *x: func.jacfwd(f, 2)(*x),
    "hessian": lambda f, *x: func.hessian(square(f))(*x),
    "vmap": lambda f, *x: func.vmap(one_by_one(f))(*x),
    "vmap of grad": lambda f, *x: func.vmap(func.grad(square(one_by_one(f)), (0, 1, 2)))(*x),
    "grad of vmap": lambda f, *x: func.grad(square(func.vmap(one_by_one(f))))(*x),
    "forward mode": forward_mode,
    "jacobian, forward mode": lambda f, *x: torch.autograd.functional.jacobian(
        f, x, strategy="forward-mode", vectorize=True
    ),
}
PUBLIC = {
    "pointwise": functools.partial(pointwise_attention, activation="gelu"),
    "l1": functools.partial(l1_attention, order="fused"),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", PUBLIC)
def test_transforms_take_the_reference(name, transform, compiled):
    """The kernels differentiate backward alone; forward mode would find no gradient and say nothing."""
    x = [torch.randn(2, 2, 5, 4) for _ in range(3)]
    run, auto = TRANSFORMS[transform], PUBLIC[name]
    reference, kernels = (functools.partial(auto, impl=impl) for impl in ("reference", "native"))
    auto(*x)  # a call that is kept does not go before
    if compiled and "mode" not in transform:
        torch.compiler.reset()
        got = torch.compile(lambda *x: run(auto, *x), fullgraph=True, backend="aot_eager")(*x)
    else:
        got = run(auto, *x)
    torch.testing.assert_close(got, run(reference, *x))
    with pytest.raises(ValueError, match=r"no transforms of torch\.func and no forward mode"):
        run(kernels, *x)


@pytest.mark.parametrize("name", PUBLIC)
def test_compiled_calls_take_the_kernels(name):
    """Not silently the plain-torch operators, as inside a transform."""
    called = set()

    def backend(graph, _):
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph

    q, k, v = qkv(b=1, h=2, n=9, d=8)
    out = torch.compile(PUBLIC[name], fullgraph=True, backend=backend)(q, k, v)
    assert f"formix.{name}_attention" in called
    close(out, PUBLIC[name](q, k, v, impl="reference"), 1e-5)


def test_flop_counter():
    """PyTorch's counter sees the kernels' products: those of its own fused attention, or of the plain-torch form."""
    shapes = {"b": 2, "h": 3, "n": 5, "m": 7, "d": 4, "dv": 6}
    for name, impl in itertools.product(PUBLIC, ("native", "reference")):
        q, k, v = (x.requires_grad_() for x in qkv(**shapes))
        with FlopCounterMode(display=False) as forward:
            out = PUBLIC[name](q, k, v, impl=impl)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        again = 0  # what the kernels do once more
        if name == "pointwise":
            assert forward.get_total_flops() == 2 * 2 * 3 * 5 * 7 * (4 + 6)
            again = 2 * 2 * 3 * 5 * 7 * 4
        else:
            assert forward.get_total_flops() == 2 * 2 * 3 * (5 + 7) * 4 * 6
            again = 2 * 2 * 3 * 7 * 4 * 6
        expected = 2 * forward.get_total_flops() + (again if impl == "native" else 0)
        assert backward.get_total_flops() == expected, (name, impl)


@pytest.mark.parametrize("name", OPERATORS)
def test_compile_for_any_shape(name):
    f = OPERATORS[name]
    compiled = torch.compile(lambda q, k, v: f(q * 2, k, v), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 5, 12):
        q, k, v = torch.randn(3, 2, 2, n, 8).unbind(0)
        close(compiled(q, k, v), f(q * 2, k, v), 1e-6)


def test_compile_for_any_scale():
    compiled = torch.compile(
        lambda q, k, v, scale: pointwise_attention(q, k, v, scale=scale), fullgraph=True, backend="aot_eager"
    )
    q, k, v = torch.randn(3, 2, 2, 9, 8).unbind(0)
    for scale in (0.1, 0.2, -0.5):
        close(compiled(q, k, v, scale), pointwise_attention(q, k, v, scale=scale, impl="reference"), 1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_exported_program_takes_any_strides(name):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return OPERATORS[name](q, k, v)

    q, k, v = (x.detach() for x in inputs64())
    program = torch.export.export(Module(), (q, k, v)).module()
    across = [x.mT.contiguous().mT for x in (q, k, v)]
    close(program(*across), OPERATORS[name](q, k, v), 1e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_erf", "softplus", "sigmoid", "relu"])
@pytest.mark.parametrize("scale", [1e-300, 1e-42, 1e-38, 1e-13, 1e13, 1e20])
def test_extreme_scales_in_bf16(activation, scale):
    q, k, v = torch.randn(3, 1, 2, 33, 32).bfloat16().unbind(0)
    options = {"activation": activation, "scale": scale}
    expected = pointwise_attention(q, k, v, **options, impl="reference").float()
    found = pointwise_attention(q, k, v, **options, impl="native").float()
    largest = expected.abs().max().clamp(min=1e-30)
    close(found / largest, expected / largest, 2e-2)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_squares_beyond_float32_are_infinite_as_in_the_reference(isa, dtype):
    q = torch.linspace(-2e20, 2e20, 41).to(dtype).view(1, 1, 41, 1)
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    options = {"activation": "relu2", "scale": 1.0}
    found = pointwise_attention(q, one, one, **options, impl="native")
    expected = pointwise_attention(q, one, one, **options, impl="reference")
    assert expected.isinf().sum() == 19
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_export_with_any_batch(name):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return OPERATORS[name](q, k, v)

    q, k, v = (x.detach().expand(3, -1, -1, -1).contiguous() for x in inputs64())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Module(), (q, k, v), dynamic_shapes=[{0: batch}] * 3)
    other = [x.detach().expand(5, -1, -1, -1).contiguous() for x in inputs64()]
    close(program.module()(*other), OPERATORS[name](*other), 1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_and_inference_mode(name):
    q, k, v = inputs64()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = OPERATORS[name](q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    with torch.inference_mode():
        close(OPERATORS[name](q, k, v), ORACLES[name](q.double(), k.double(), v.double()), 1e-5)


def test_refusals_name_the_reason():
    q, k, v = qkv(b=1, h=1, n=4, d=8)
    assert native.cannot_run(q, k, v) is None
    assert "float64" in native.cannot_run(q.double(), k.double(), v.double())
    assert "meta" in native.cannot_run(q.to("meta"), k, v)
    assert "contiguous" in native.cannot_run(q.transpose(2, 3), k, v)
    assert "256" in native.cannot_run(*qkv(b=1, h=1, n=2, d=257))
    with pytest.raises(ValueError, match="the names are"):
        native.set_isa("mmx")


@pytest.mark.parametrize("name", ["portable", "mmx", ""])
def test_environment_forces_an_instruction_set(name):
    code = "from formix.ops import native; print(native.available())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FORMIX_ISA": name}, capture_output=True, text=True, check=True
    )
    assert {"portable": "(True, 'portable')", "mmx": "FORMIX_ISA=mmx", "": "(True, "}[name] in done.stdout
    assert ("FORMIX_ISA=mmx cannot be used" in done.stderr) == (name == "mmx")


def test_a_library_of_another_version_is_not_used():
    import _ctypes  # a shared library that is none of formix's

    code = "from formix.ops import native; print(native.available())"
    environment = {**os.environ, "FORMIX_NATIVE": _ctypes.__file__}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "is not of this version of formix: reinstall formix" in out


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc/self/maps")
def test_one_openmp_runtime():
    """In a process of its own: other packages (scikit-learn) bring theirs."""
    code = (
        "import torch; from formix.ops import native; x = torch.randn(1, 2, 64, 16); "
        "native.pointwise_attention(x, x, x); "
        "print('\\n'.join({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    runtimes = out.split()
    assert runtimes
    assert len(runtimes) == 1 or not any("/torch" in r for r in runtimes)


def test_without_an_openmp_runtime():
    """In a process without PyTorch, which brings it: the kernels run on the calling thread."""
    code = """if True:
        import array, ctypes, struct, sys
        library = ctypes.CDLL(sys.argv[1])
        assert library.formix_use_threads() == 1
        n, d = 40, 16
        q, k, v = (array.array("f", [(i * step) % 7 - 3 for i in range(n * d)]) for step in (2, 3, 5))
        out = array.array("f", [0.0] * n * d)
        tensors = [number for t in (q, k, v, out) for number in (t.buffer_info()[0], n * d, n * d, d)]
        numbers = 1, 1, 1, n, n, d, d, 0, 0, 0, 2, -1, 1.0, 1.0  # float32, relu, two threads
        call = struct.pack(sys.argv[2], *numbers, *tensors, *[0] * 21)
        assert library.formix_pointwise_forward(call) == 0
        for i in range(n):
            row = [sum(q[i * d + c] * k[j * d + c] for c in range(d)) for j in range(n)]
            for c in range(d):
                assert abs(out[i * d + c] - sum(max(row[j], 0) * v[j * d + c] for j in range(n)) / n) < 1e-3
        print("same")
    """
    command = [sys.executable, "-c", code, native_library.library()._name, native_library.POINTWISE.struct.format]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "same"


def test_memory_stays_far_below_a_score_matrix(isa):
    if isa == "portable":
        pytest.skip("slow there, and the blocking is the same")
    n = 8192
    code = (
        "import resource, torch; from formix.ops import native; torch.set_num_threads(1); "
        f"native.set_isa('{isa}'); "
        "q, k, v = (torch.randn(1, 1, {0}, 16, requires_grad=True) for _ in range(3)); "
        "small = torch.randn(1, 1, 9, 16, requires_grad=True); "
        "native.pointwise_attention(small, small, small).sum().backward(); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "native.pointwise_attention(q, k, v).sum().backward(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    ).format(n)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) * 1024 < n * n * 4 / 8


@st.composite
def problems(draw):
    heads_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = st.one_of(st.integers(1, 20), st.integers(21, 130), st.sampled_from([197, 385, 400]))
    channels = st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 96, 128]))
    n, m = draw(size), draw(size)
    return {
        "b": draw(st.integers(1, 2)),
        "h": heads_kv * group,
        "hkv": heads_kv,
        "n": n,
        "m": draw(st.sampled_from([n, m])),
        "d": draw(channels),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
    }


MASKS = {
    "none": lambda b, h, n, m: None,
    "keys": lambda b, h, n, m: bits(b, 1, 1, m),
    "prefix": lambda b, h, n, m: torch.arange(m) < torch.randint(0, m + 1, (b, 1, 1, 1)),
    "queries": lambda b, h, n, m: bits(b, 1, n, 1),
    "heads": lambda b, h, n, m: bits(1, h, n, m),
    "full": lambda b, h, n, m: bits(b, h, n, m),
    "transposed": lambda b, h, n, m: bits(m, n).t(),
}


@pytest.mark.slow
@settings(max_examples=2000)
@given(
    problem=problems(),
    isa=st.sampled_from(ISAS),
    activation=st.sampled_from(ACTIVATIONS),
    mask=st.sampled_from(list(MASKS)),
    causal=st.booleans(),
    exponent=st.sampled_from([0.0, 0.5, 1.0]),
    length=st.sampled_from([None, 1, 50]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_fuzz_pointwise(problem, isa, activation, mask, causal, exponent, length, threads):
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    native.set_isa(isa)
    try:
        inputs = qkv(**problem)
        check(
            native.pointwise_attention,
            pointwise,
            inputs,
            2 * TOLERANCE[problem["dtype"]],
            activation=activation,
            length_exponent=0.0 if activation == "sigmoid_bias" else exponent,
            length=length,
            is_causal=causal,
            attn_mask=MASKS[mask](problem["b"], problem["h"], problem["n"], problem["m"]),
        )
    finally:
        native.set_isa("auto")
        torch.set_num_threads(1)


@pytest.mark.slow
@settings(max_examples=500)
@given(problem=problems(), isa=st.sampled_from(ISAS), masked=st.booleans(), threads=st.sampled_from([1, 2, 5]))
def test_fuzz_l1(problem, isa, masked, threads):
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    native.set_isa(isa)
    try:
        q, k, v = qkv(**{**problem, "hkv": problem["h"]})
        # With few tokens the two terms of a gradient, about 1 / (tokens * smallest |q|), nearly cancel.
        q, k = (x + x.sign() / 2 for x in (q, k))
        mask = bits(q.shape[0], k.shape[2]) if masked else None
        tokens = min(q.shape[2], k.shape[2] if mask is None else int(mask.sum(1).clamp(min=1).min()))
        tolerance = 3 * TOLERANCE[problem["dtype"]]
        check(native.l1_attention, l1, [q, k, v], tolerance, floor=10 / tokens, key_padding_mask=mask)
    finally:
        native.set_isa("auto")
        torch.set_num_threads(1)
