"""`pointwise_attention` against the float64 formula: output, every gradient, second gradients, and what it refuses."""

import math

import pytest
import torch
from oracles import H, close, pointwise

from formix.ops import pointwise_attention

OP = "pointwise_attention"
ACTIVATIONS = [*H, "sigmoid_bias"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in TOLERANCE]


def qkv(b=2, h=3, n=7, m=None, d=8, dv=None, hkv=None, dtype=torch.float64, spread=2.0):
    """Random query [b, h, n, d], key [b, hkv, m, d] and value [b, hkv, m, dv]."""
    hkv, m, dv = hkv or h, n if m is None else m, dv or d
    shapes = [(b, h, n, d), (b, hkv, m, d), (b, hkv, m, dv)]
    return [(torch.randn(s, dtype=torch.float64) * spread).to(dtype) for s in shapes]


def packed_views(dtype):
    """q, k, v as an attention layer makes them: transposed views of one projection's output."""
    packed = torch.randn(2, 7, 3, 3, 8, dtype=torch.float64).to(dtype)
    return list(packed.permute(2, 0, 3, 1, 4).unbind(0))


def bits(*shape):
    return torch.rand(shape) > 0.4


def blind_rows():
    mask = bits(2, 3, 7, 7)
    mask[0, :, 2] = mask[1, 0, 0] = False
    return mask


# name -> (shapes, arguments); the arguments are made in the test so that every case draws the same numbers
CASES = {
    "self": ({}, dict),
    "more_queries": ({"n": 9, "m": 4}, dict),
    "more_keys": ({"n": 4, "m": 9}, dict),
    "one_token": ({"n": 1}, dict),
    "one_query": ({"n": 1, "m": 9}, dict),
    "one_key": ({"n": 9, "m": 1}, dict),
    "head_size_1": ({"d": 1}, dict),
    "head_size_13": ({"d": 13}, dict),
    "long": ({"b": 1, "h": 1, "n": 131, "m": 257, "d": 16}, dict),
    "wider_values": ({"dv": 13}, dict),
    "narrower_values": ({"dv": 3}, dict),
    "grouped": ({"h": 6, "hkv": 2}, lambda: {"enable_gqa": True}),
    "multi_query": ({"h": 4, "hkv": 1}, lambda: {"enable_gqa": True}),
    "grouped_causal_mask": (
        {"h": 6, "hkv": 2},
        lambda: {"enable_gqa": True, "is_causal": True, "attn_mask": bits(2, 6, 7, 7)},
    ),
    "key_padding": ({}, lambda: {"attn_mask": bits(2, 1, 1, 7)}),
    "mask_per_query": ({}, lambda: {"attn_mask": bits(7, 7)}),
    "mask_of_keys": ({}, lambda: {"attn_mask": bits(7)}),
    "mask_of_queries": ({}, lambda: {"attn_mask": bits(7, 1)}),
    "mask_per_head": ({}, lambda: {"attn_mask": bits(1, 3, 7, 7)}),
    "full_mask": ({}, lambda: {"attn_mask": bits(2, 3, 7, 7)}),
    "mask_of_everything": ({}, lambda: {"is_causal": True, "attn_mask": torch.tensor(True)}),
    "expanded_mask": ({}, lambda: {"attn_mask": bits(2, 1, 1, 7).expand(2, 3, 7, 7)}),
    "transposed_mask": ({}, lambda: {"attn_mask": bits(2, 3, 7, 7).transpose(-1, -2)}),
    "blind_rows": ({}, lambda: {"attn_mask": blind_rows()}),
    "causal": ({}, lambda: {"is_causal": True}),
    "causal_mask": ({}, lambda: {"is_causal": True, "attn_mask": bits(2, 1, 7, 7)}),
    "causal_padding": ({}, lambda: {"is_causal": True, "attn_mask": bits(2, 1, 1, 7)}),
    "causal_more_keys": ({"n": 4, "m": 9}, lambda: {"is_causal": True}),
    "causal_more_queries": ({"n": 9, "m": 4}, lambda: {"is_causal": True}),
    "fixed_length": ({}, lambda: {"length": 196}),
    "fixed_length_mask": ({}, lambda: {"length": 3, "attn_mask": bits(2, 1, 1, 7), "is_causal": True}),
    "scale": ({}, lambda: {"scale": 0.3}),
    "negative_scale": ({}, lambda: {"scale": -1.0}),
    "batch_0": ({"b": 0}, dict),
    "no_queries": ({"n": 0, "m": 3}, dict),
    "no_keys": ({"n": 3, "m": 0}, dict),
}


def check(inputs, arguments, impl, tolerance):
    """Output and gradients by name against the oracle of the same (rounded) inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = pointwise_attention(*inputs, impl=impl, **arguments)
    assert out.dtype == inputs[0].dtype
    weight = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, inputs, weight)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    oracle_arguments = {k: v for k, v in arguments.items() if k != "enable_gqa"}
    expected = pointwise(*exact, **oracle_arguments)
    expected_gradients = torch.autograd.grad(expected, exact, weight.double())
    close(out, expected, tolerance)
    for name, got, want in zip(("query", "key", "value"), gradients, expected_gradients, strict=True):
        assert got.dtype == out.dtype
        close(got, want, tolerance, f"gradient of {name}", floor=0.1)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_shapes_and_masks(case, dtype, impl):
    shapes, make = CASES[case]
    check(qkv(**shapes, dtype=dtype), {"activation": "gelu", "length_exponent": 0.5} | make(), impl, TOLERANCE[dtype])


@pytest.mark.parametrize("arguments", [{}, {"enable_gqa": True}], ids=["", "grouped"])
def test_no_heads(arguments, impl):
    x = torch.randn(2, 0, 7, 8, requires_grad=True)
    out = pointwise_attention(x, x, x, impl=impl, **arguments)
    out.sum().backward()
    assert out.shape == x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length_exponent", [0, 0.5, 1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_exponents(activation, length_exponent, dtype, impl):
    if activation == "sigmoid_bias" and length_exponent not in (0, 1):
        with pytest.raises(ValueError, match="length enters as the bias"):
            pointwise_attention(*qkv(), activation=activation, length_exponent=length_exponent, impl=impl)
        return
    arguments = {"activation": activation, "length_exponent": length_exponent}
    check(qkv(dtype=dtype), arguments, impl, TOLERANCE[dtype])
    check(qkv(dtype=dtype), arguments | {"attn_mask": blind_rows(), "is_causal": True}, impl, TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64_equals_the_formula(activation):
    check(qkv(), {"activation": activation, "is_causal": True, "attn_mask": blind_rows()}, "reference", 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_packed_projection(dtype, impl):
    views = packed_views(dtype)
    assert not any(x.is_contiguous() for x in views)
    out = check(views, {"activation": "softplus", "is_causal": True}, impl, TOLERANCE[dtype])
    dense = pointwise_attention(*(x.contiguous() for x in views), activation="softplus", is_causal=True, impl=impl)
    close(out, dense, 1e-6 if dtype == torch.float32 else TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_without_a_visible_key_are_exactly_zero(activation, impl):
    mask = blind_rows()
    out = pointwise_attention(*qkv(dtype=torch.float32), activation=activation, attn_mask=mask, impl=impl)
    blind = ~mask.any(-1)
    assert blind.any()
    assert torch.equal(out[blind], torch.zeros_like(out[blind]))
    assert (out[~blind] != 0).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_gradients(activation):
    inputs = [x.requires_grad_() for x in qkv(b=1, h=2, n=3, m=4, d=2, hkv=1, spread=1.0)]
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)

    def attention(*x):
        return pointwise_attention(
            *x, activation=activation, attn_mask=mask, length_exponent=1, enable_gqa=True, impl="reference"
        )

    assert torch.autograd.gradcheck(attention, inputs)
    assert torch.autograd.gradgradcheck(attention, inputs)


def test_sigmoid_bias_is_sigmoid_of_the_score_minus_log_of_the_length(impl):
    q, k, v = qkv(dtype=torch.float32)
    n = k.shape[2]
    expected = torch.einsum("bhij,bhje->bhie", torch.sigmoid(q @ k.mT / math.sqrt(8) - math.log(n)), v)
    close(pointwise_attention(q, k, v, activation="sigmoid_bias", impl=impl), expected, 1e-5)
    close(pointwise_attention(q, k, v, activation="sigmoid_bias", length=n, impl=impl), expected, 1e-5)


def test_length_is_what_a_row_may_see(impl):
    """With all scores 1 and all values 1, relu attention with a = 1 is the mean of ones: 1 wherever a key is seen."""
    ones = torch.ones(2, 1, 5, 4)
    mask = bits(2, 1, 5, 5)
    mask[..., 0] = True
    for arguments in ({}, {"is_causal": True}, {"attn_mask": mask}, {"is_causal": True, "attn_mask": mask}):
        out = pointwise_attention(ones, ones, ones, scale=0.25, impl=impl, **arguments)
        torch.testing.assert_close(out, ones)
    fixed = pointwise_attention(ones, ones, ones, scale=0.25, length=10, impl=impl)
    torch.testing.assert_close(fixed, ones / 2)


def test_default_is_relu_divided_by_the_length(impl):
    q, k, v = qkv(dtype=torch.float32)
    expected = torch.relu(q @ k.mT / math.sqrt(8)) @ v / 7
    close(pointwise_attention(q, k, v, impl=impl), expected, 1e-5)


def test_the_reference_accumulates_16_bit_inputs_in_float32():
    n = 4096  # in bfloat16 a running sum of ones stops at 256
    ones = torch.ones(1, 1, n, 1, dtype=torch.bfloat16)
    out = pointwise_attention(ones[:, :, :1], ones, ones, length_exponent=0, impl="reference")
    assert out.item() == n


@pytest.mark.parametrize("with_mask", [False, True], ids=["plain", "masked"])
def test_autocast_computes_in_its_type(with_mask, impl):
    """Mixed types, as an autocast layer with query-key norms makes them, are cast as torch's own attention does."""
    q, k, v = qkv(dtype=torch.float32)
    arguments = {"attn_mask": bits(2, 1, 7, 7)} if with_mask else {}
    with torch.autocast(q.device.type, torch.bfloat16):
        out = pointwise_attention(q, k, v.bfloat16(), impl=impl, **arguments)
    assert out.dtype == torch.bfloat16
    rounded = [x.bfloat16().double() for x in (q, k, v)]
    close(out, pointwise(*rounded, **arguments), 4e-3)


@pytest.mark.parametrize("activation", ["relu", "sigmoid_bias"])
def test_bias_of_the_scores(activation):
    """As further channels: of the queries the bias over the scale, of the keys a one for every key; gradients too."""
    q, k, v = (x.requires_grad_() for x in qkv(m=5))
    bias, scale = torch.randn(1, 3, 7, 5, dtype=torch.float64, requires_grad=True), 8**-0.5
    arguments = {"activation": activation, "attn_mask": bits(2, 1, 7, 5)}
    wide_q = torch.cat([q, bias.expand(2, -1, -1, -1) / scale], -1)
    wide_k = torch.cat([k, torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5)], -1)
    expected = pointwise(wide_q, wide_k, v, scale=scale, **arguments)
    out = pointwise_attention(q, k, v, attn_bias=bias, **arguments)
    close(out, expected, 1e-12)
    cotangent = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(o, (q, k, v, bias), cotangent) for o in (out, expected)), strict=True):
        close(got, want, 1e-11)


def test_a_bias_is_not_lost_after_an_equal_call_without():
    """Equal calls go straight to the kernels, which have no bias."""
    q, k, v = qkv(dtype=torch.float32)
    for _ in range(3):
        plain = pointwise_attention(q, k, v)
    with_bias = pointwise_attention(q, k, v, attn_bias=torch.ones(7, 7))
    close(with_bias, pointwise_attention(q, k, v, attn_bias=torch.ones(7, 7), impl="reference"), 1e-6)
    assert not torch.allclose(with_bias, plain)


def test_dropout_of_weights():
    ones = torch.ones(1, 1, 1000, 4)
    out = pointwise_attention(ones[:, :, :50], ones, ones, scale=0.25, dropout_p=0.2)
    assert out.std() > 0
    assert abs(out.mean() - 1) < 0.02
    assert torch.equal(pointwise_attention(ones, ones, ones, dropout_p=0.0), pointwise_attention(ones, ones, ones))


Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 6, 8)
REFUSED = {
    "list": (([1.0], K, V), {}, "query is a list"),
    "three_dimensions": ((Q[0], K, V), {}, "4 dimensions"),
    "integers": ((Q.int(), K.int(), V.int()), {}, "dtype torch.int32"),
    "two_dtypes": ((Q.half(), K, V), {}, "dtypes .* must be the same"),
    "batch": ((Q, K[:1], V), {}, "batch sizes 2, 1 and 2"),
    "head_size": ((Q, K[..., :4], V), {}, "head sizes 8 and 4"),
    "tokens": ((Q, K, V[:, :, :3]), {}, "heads and tokens must agree"),
    "heads": ((Q, K[:, :2], V[:, :2]), {}, "enable_gqa=True"),
    "heads_not_multiple": ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}, "multiple"),
    "float_mask": ((Q, K, V), {"attn_mask": torch.zeros(5, 6)}, "boolean mask"),
    "mask_shape": ((Q, K, V), {"attn_mask": torch.ones(6, 5, dtype=torch.bool)}, "must broadcast to"),
    "mask_too_large": ((Q, K, V), {"attn_mask": torch.ones(3, 2, 4, 5, 6, dtype=torch.bool)}, "must broadcast to"),
    "mask_list": ((Q, K, V), {"attn_mask": [[True]]}, "attn_mask is a list"),
    "mask_device": ((Q, K, V), {"attn_mask": torch.ones(5, 6, device="meta").bool()}, "attn_mask on meta"),
    "bias_shape": ((Q, K, V), {"attn_bias": torch.zeros(4, 6, 5)}, "attn_bias has shape .* must broadcast to"),
    "bias_boolean": ((Q, K, V), {"attn_bias": torch.ones(5, 6, dtype=torch.bool)}, "attn_bias has dtype torch.bool"),
    "bias_list": ((Q, K, V), {"attn_bias": [1.0]}, "attn_bias is a list"),
    "bias_device": ((Q, K, V), {"attn_bias": torch.ones(5, 6, device="meta")}, "attn_bias on meta"),
    "activation": ((Q, K, V), {"activation": "softmax"}, "activation is 'softmax'"),
    "negative_exponent": ((Q, K, V), {"length_exponent": -1}, "length_exponent is -1"),
    "nan_exponent": ((Q, K, V), {"length_exponent": float("nan")}, "length_exponent is nan"),
    "length_0": ((Q, K, V), {"length": 0}, "length is 0"),
    "length_half": ((Q, K, V), {"length": 1.5}, "length is 1.5"),
    "length_infinite": ((Q, K, V), {"length": float("inf")}, "length is inf"),
    "dropout": ((Q, K, V), {"dropout_p": 1.0}, "dropout_p is 1.0"),
    "float8": ((Q.to(torch.float8_e4m3fn),) * 3, {}, "dtype torch.float8_e4m3fn"),
    "exponent_word": ((Q, K, V), {"length_exponent": "1"}, "length_exponent is '1'"),
    "activation_list": ((Q, K, V), {"activation": ["relu"]}, "activation is"),
    "scale_nan": ((Q, K, V), {"scale": float("nan")}, "scale is nan"),
    "scale_tensor": ((Q, K, V), {"scale": torch.ones(())}, "scale is tensor.* must be a number"),
    "causal_word": ((Q, K, V), {"is_causal": "yes"}, "is_causal is 'yes'"),
    "sparse": ((Q.to_sparse(), K, V), {}, r"query has layout torch\.sparse_coo; .* to_dense"),
    "mkldnn": ((Q, K, V.to_mkldnn()), {}, r"value has layout torch\._mkldnn"),
    "sparse_mask": ((Q, K, V), {"attn_mask": torch.eye(5, 6).bool().to_sparse()}, "attn_mask has layout"),
    "sparse_bias": ((Q, K, V), {"attn_bias": torch.eye(5, 6).to_sparse()}, "attn_bias has layout"),
    "impl": ((Q, K, V), {"impl": "fast"}, "impl is 'fast'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    inputs, arguments, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        pointwise_attention(*inputs, **arguments)
