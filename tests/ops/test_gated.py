"""`gated_unit` (Activator) against its formula."""

import pytest
import torch
from oracles import ACT, close, layer_norm

from formix.ops import gated_unit

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in TOLERANCE]
NORMS = ("none", "own", "tied", "weights_only")
C, INNER = 6, 10


def tensors(dtype=torch.float64, norm="none", bias=True, shape=(2, 5), c=C, f=INNER):
    """x, the projections by name, and the inner norms by name."""
    made = {"x": (*shape, c), "weight_1": (f, c), "weight_2": (f, c), "weight_3": (c, f)}
    if bias:
        made |= {"bias_1": (f,), "bias_2": (f,), "bias_3": (c,)}
    if norm != "none":
        made |= {"norm_weight": (f,)} | ({} if norm == "weights_only" else {"norm_bias": (f,)})
    if norm == "own":
        made |= {"norm_2_weight": (f,), "norm_2_bias": (f,)}
    return {name: torch.randn(s, dtype=torch.float64).to(dtype) for name, s in made.items()}


def call(t, **options):
    rest = {k: v for k, v in t.items() if "norm" in k}
    projections = [t.get(f"{kind}_{i}") for i in (1, 2, 3) for kind in ("weight", "bias")]
    return gated_unit(t["x"], *projections, **rest, **options)


def oracle(t, activation, eps=1e-5):
    def linear(x, i):
        y = torch.einsum("...c,fc->...f", x, t[f"weight_{i}"])
        return y if f"bias_{i}" not in t else y + t[f"bias_{i}"]

    u, v = ACT[activation](linear(t["x"], 1)), linear(t["x"], 2)
    if "norm_weight" in t:
        u = layer_norm(u, t["norm_weight"], t.get("norm_bias"), eps)
        second = "norm_2" if "norm_2_weight" in t else "norm"
        v = layer_norm(v, t[f"{second}_weight"], t.get(f"{second}_bias"), eps)
    return linear(u * v, 3)


def check(t, tolerance, activation, **options):
    leaves = {k: x.detach().requires_grad_() for k, x in t.items()}
    out = call(leaves, activation=activation, **options)
    weight = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), weight)
    exact = {k: x.detach().double().requires_grad_() for k, x in t.items()}
    expected = oracle(exact, activation, **options)
    wanted = torch.autograd.grad(expected, list(exact.values()), weight.double())
    close(out, expected, tolerance)
    for name, got, want in zip(leaves, gradients, wanted, strict=True):
        close(got, want, tolerance, f"gradient of {name}", floor=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACT)
def test_equals_the_formula(activation, norm, bias, dtype):
    check(tensors(dtype, norm, bias), TOLERANCE[dtype], activation)


@pytest.mark.parametrize("shape", [(), (7,), (1, 1), (2, 3, 4), (0, 5)], ids=str)
def test_any_leading_shape(shape):
    check(tensors(torch.float32, "own", shape=shape), 1e-5, "silu")


def test_eps_of_the_inner_norms():
    t = tensors(torch.float32, "own")
    t["x"] *= 1e-2  # so that eps counts
    check(t, 1e-5, "gelu", eps=1e-2)
    assert not torch.allclose(call(t, eps=1e-2), call(t, eps=1e-6))


def test_tied_norm_gathers_the_gradients_of_both_branches():
    """The official unit has one norm: its gradient is the sum of the gradients of two equal ones."""
    t = {k: x.requires_grad_() for k, x in tensors(norm="tied").items()}
    tied = torch.autograd.grad(call(t).sum(), [t["norm_weight"], t["norm_bias"]])
    second = {f"norm_2_{k}": t[f"norm_{k}"].detach().clone().requires_grad_() for k in ("weight", "bias")}
    out = call(t | second)
    close(out, call(t), 1e-12)
    first = torch.autograd.grad(out.sum(), [t["norm_weight"], t["norm_bias"], *second.values()])
    close(tied[0], first[0] + first[2], 1e-12)
    close(tied[1], first[1] + first[3], 1e-12)


@pytest.mark.parametrize(
    ("activation", "norm"), [("gelu", "none"), ("silu", "own"), ("sigmoid", "tied"), ("identity", "weights_only")]
)
def test_gradients_of_gradients(activation, norm):
    t = {k: x.requires_grad_() for k, x in tensors(norm=norm, shape=(2,), c=2, f=3).items()}

    def unit(*values):
        return call(dict(zip(t, values, strict=True)), activation=activation)

    assert torch.autograd.gradcheck(unit, list(t.values()))
    assert torch.autograd.gradgradcheck(unit, list(t.values()), fast_mode=True)


def test_tokens_are_not_mixed():
    t = tensors(norm="own", shape=(5,))
    jacobian = torch.autograd.functional.jacobian(lambda x: call(t | {"x": x}), t["x"])  # [5, C, 5, C]
    across = jacobian.abs().sum((1, 3))
    assert torch.equal(across != 0, torch.eye(5, dtype=torch.bool))


ONES = torch.ones(INNER)
REFUSED = {
    "activation": ({}, {"activation": "relu6"}, "activation is 'relu6'"),
    "x": ({"x": torch.zeros(2, C + 1)}, {}, f"x has {C + 1} channels"),
    "weight_2": ({"weight_2": torch.zeros(INNER + 1, C)}, {}, r"must be \[F, C\]"),
    "weight_3": ({"weight_3": torch.zeros(C, INNER + 1)}, {}, r"must be \[F, C\]"),
    "weight_1": ({"weight_1": torch.zeros(INNER)}, {}, r"weight_1 is \[10\]"),
    "output": ({"weight_3": torch.zeros(C + 1, INNER)}, {}, r"weight_3 \[7, 10\]"),
    "bias": ({"bias_1": torch.zeros(INNER + 1)}, {}, r"bias_1 \[11\]"),
    "norm": ({"norm_weight": torch.ones(C)}, {}, r"norm_weight \[6\]"),
    "second norm alone": ({"norm_2_weight": ONES}, {}, "norm_2_weight given without norm_weight"),
    "second bias alone": ({"norm_weight": ONES, "norm_2_bias": ONES}, {}, "norm_2_bias given without norm_2_weight"),
    "dtype": ({"weight_3": torch.zeros(C, INNER, dtype=torch.float64)}, {}, "weight_3 torch.float64"),
    "list": ({"x": [1.0]}, {}, "x is a list"),
    "whole numbers": ({"x": torch.ones(2, C, dtype=torch.long)}, {}, "x has dtype torch.int64"),
    "sparse": ({"x": torch.ones(2, C).to_sparse()}, {}, "x has layout torch.sparse_coo"),
    "device": ({"weight_1": torch.zeros(INNER, C, device="meta")}, {}, "weight_1 on meta"),
    "eps": ({}, {"eps": -1.0}, "eps is -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    replaced, options, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        call(tensors(torch.float32) | replaced, **options)
