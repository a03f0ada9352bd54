"""`skip_layer_attention` against attention of each head by itself."""

import pytest
import torch
import torch.nn.functional as F
from oracles import close, pointwise, softmax

from formix.ops import select_heads, skip_layer_attention

OP = "skip_layer_attention"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in TOLERANCE]
NAMES = ("query", "key", "value", "source_key", "source_value")
HEADS = {"none": 0, "first": 1, "first_two": 2, "all": 4, "middle": (1, 2), "last_and_first": (3, 0), "empty": ()}
MIXERS = {"softmax": softmax, "pointwise": pointwise}


def inputs(dtype=torch.float64, b=2, h=4, hkv=4, n=5, m=None, d=6):
    m = m or n
    shapes = [(b, h, n, d)] + [(b, hkv, m, d)] * 4
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]


def oracle(q, k, v, sk, sv, *, skip_heads, mixer, **arguments):
    """Head by head: each key/value head with the query heads that it serves."""
    skipped = range(skip_heads) if isinstance(skip_heads, int) else skip_heads
    group = q.shape[1] // k.shape[1]
    outputs = []
    for i in range(k.shape[1]):
        key, value = (sk, sv) if i in skipped else (k, v)
        own = slice(i, i + 1)
        outputs.append(MIXERS[mixer](q[:, i * group : (i + 1) * group], key[:, own], value[:, own], **arguments))
    return torch.cat(outputs, 1)


def mask():
    seen = torch.rand(2, 1, 5, 5) > 0.4
    seen[..., 0] = True
    return seen


ARGUMENTS = {
    "plain": dict,
    "mask": lambda: {"attn_mask": mask()},
    "keys": lambda: {"attn_mask": torch.arange(5) < 3},
    "causal": lambda: {"is_causal": True},
    "causal_mask": lambda: {"is_causal": True, "attn_mask": mask()},
    "scale": lambda: {"scale": 0.7},
}


def check(tensors, tolerance, *, enable_gqa=False, **arguments):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = skip_layer_attention(*leaves, enable_gqa=enable_gqa, **arguments)
    weight = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, leaves, weight, allow_unused=True)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = oracle(*exact, **arguments)
    wanted = torch.autograd.grad(expected, exact, weight.double(), allow_unused=True)
    assert out.dtype == leaves[0].dtype
    close(out, expected, tolerance)
    for name, got, want, leaf in zip(NAMES, gradients, wanted, leaves, strict=True):
        zero = torch.zeros_like(leaf)
        close(zero if got is None else got, zero if want is None else want, tolerance, f"gradient of {name}", 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_heads(mixer, heads, dtype):
    check(inputs(dtype), TOLERANCE[dtype], mixer=mixer, skip_heads=HEADS[heads])


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_masks(mixer, arguments):
    check(inputs(torch.float32), 1e-5, mixer=mixer, skip_heads=(0, 2), **ARGUMENTS[arguments]())


@pytest.mark.parametrize("skip_heads", [1, (1,), (0, 1)])
@pytest.mark.parametrize("mixer", MIXERS)
def test_grouped_queries_count_key_heads(mixer, skip_heads):
    check(inputs(torch.float32, hkv=2), 1e-5, mixer=mixer, skip_heads=skip_heads, enable_gqa=True, is_causal=True)


@pytest.mark.parametrize("mixer", MIXERS)
def test_cross_lengths_batch_0_and_one_token(mixer):
    check(inputs(torch.float32, n=3, m=8), 1e-5, mixer=mixer, skip_heads=2)
    check(inputs(torch.float32, n=1), 1e-5, mixer=mixer, skip_heads=2)
    out = skip_layer_attention(*inputs(torch.float32, b=0), mixer=mixer, skip_heads=2)
    assert out.shape == (0, 4, 5, 6)


def test_options_of_the_pointwise_mixer():
    arguments = {"activation": "softplus", "length_exponent": 0.5, "length": 7}
    check(inputs(torch.float32), 1e-5, mixer="pointwise", skip_heads=3, **arguments)


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_of_gradients(mixer):
    leaves = [x.requires_grad_() for x in inputs(b=1, h=2, hkv=2, n=3, d=2)]
    arguments = {"activation": "gelu", "impl": "reference"} if mixer == "pointwise" else {}

    def attention(*x):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return skip_layer_attention(*x, mixer=mixer, skip_heads=(1,), **arguments)

    assert torch.autograd.gradcheck(attention, leaves)
    assert torch.autograd.gradgradcheck(attention, leaves, fast_mode=True)


def test_no_skip_heads_are_plain_attention_to_the_bit():
    q, k, v, sk, sv = inputs(torch.float32)
    out = skip_layer_attention(q, k, v, sk, sv, skip_heads=0, is_causal=True)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    swapped = skip_layer_attention(q, k, v, sk, sv, skip_heads=4, is_causal=True)
    assert torch.equal(swapped, F.scaled_dot_product_attention(q, sk, sv, is_causal=True))


def test_unused_heads_get_no_gradient():
    leaves = [x.requires_grad_() for x in inputs(torch.float32)]
    skip_layer_attention(*leaves, skip_heads=(1, 3)).sum().backward()
    _, k, v, sk, sv = leaves
    for own, source in ((k, sk), (v, sv)):
        assert not own.grad[:, [1, 3]].any()
        assert not source.grad[:, [0, 2]].any()
    assert sv.grad[:, [1, 3]].any(dim=-1).all()
    assert v.grad[:, [0, 2]].any(dim=-1).all()


def test_select_heads():
    own, source = torch.zeros(1, 4, 2, 3), torch.ones(1, 4, 2, 3)
    for heads, expected in ((2, [1, 1, 0, 0]), ((2,), [0, 0, 1, 0]), ((3, 1), [0, 1, 0, 1]), ([0, 1], [1, 1, 0, 0])):
        assert select_heads(own, source, heads)[0, :, 0, 0].tolist() == expected


X = torch.zeros(2, 4, 5, 6)
REFUSED = {
    "mixer": ({"mixer": "sima", "skip_heads": 1}, "mixer is 'sima'"),
    "too_many": ({"skip_heads": 5}, "different heads from 0 to 3"),
    "negative_number": ({"skip_heads": -1}, "different heads from 0 to 3"),
    "unknown_head": ({"skip_heads": (4,)}, "different heads from 0 to 3"),
    "negative_head": ({"skip_heads": (-1,)}, "different heads from 0 to 3"),
    "twice": ({"skip_heads": (1, 1)}, "different heads"),
    "share": ({"skip_heads": 0.75}, "number of heads or a list"),
    "word": ({"skip_heads": "01"}, "number of heads or a list"),
    "nothing": ({"skip_heads": None}, "number of heads or a list"),
    "unknown_option": ({"skip_heads": 1, "mixer": "pointwise", "power": 2}, "'power' is no option"),
    "softmax_mask_shape": ({"skip_heads": 1, "attn_mask": torch.ones(3, 3, dtype=torch.bool)}, "must broadcast to"),
    "softmax_mask_integers": ({"skip_heads": 1, "attn_mask": torch.ones(5, 5).long()}, "dtype torch.int64"),
    "pointwise_float_mask": ({"skip_heads": 1, "mixer": "pointwise", "attn_mask": torch.ones(5, 5)}, "boolean mask"),
    "dropout": ({"skip_heads": 1, "dropout_p": 2.0}, "dropout_p is 2.0"),
    "scale_word": ({"skip_heads": 1, "scale": "small"}, "scale is 'small'"),
    "scale_nan": ({"skip_heads": 1, "scale": float("nan")}, "scale is nan"),
    "causal_word": ({"skip_heads": 1, "is_causal": "yes"}, "is_causal is 'yes'"),
    "softmax_option": ({"skip_heads": 1, "activation": "relu"}, "options of mixer='pointwise'"),
    "softmax_impl": ({"skip_heads": 1, "impl": "native"}, "cannot run softmax"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    arguments, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        skip_layer_attention(X, X, X, X, X, **arguments)


def test_an_additive_mask_may_come_with_a_causal_one():
    q, k, v, sk, sv = (torch.randn(2, 4, 5, 6) for _ in range(5))
    visible = torch.rand(5, 5) > 0.3
    visible.fill_diagonal_(True)
    additive = torch.zeros(5, 5).masked_fill(~visible, float("-inf"))
    options = {"skip_heads": 2, "is_causal": True}
    expected = skip_layer_attention(q, k, v, sk, sv, attn_mask=visible, **options)
    torch.testing.assert_close(skip_layer_attention(q, k, v, sk, sv, attn_mask=additive, **options), expected)


@pytest.mark.parametrize(
    "source",
    [X[:, :2], X[:, :, :3], X[..., :4], X.double(), X.to("meta"), [1.0]],
    ids=["heads", "tokens", "head_size", "dtype", "device", "list"],
)
def test_refused_source_shapes(source):
    with pytest.raises(ValueError, match="they must agree"):
        skip_layer_attention(X, X, X, source, X, skip_heads=1)
    with pytest.raises(ValueError, match="they must agree"):
        skip_layer_attention(X, X, X, X, source, skip_heads=1)
