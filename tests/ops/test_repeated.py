"""The short way to the kernel: the same numbers as the long way, and never where somebody else has to see the call."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from formix.ops import l1_attention, pointwise_attention, repeated
from formix.ops.native_library import library_on_tensors
from formix.ops.registry import native_module

if native_module() is None or not native_module().available()[0]:
    pytest.skip("no CPU kernels here", allow_module_level=True)

N, D = 7, 16
CALLS = {
    "relu": lambda q, k, v: pointwise_attention(q, k, v),
    "causal": lambda q, k, v: pointwise_attention(q, k, v, activation="gelu", is_causal=True, scale=0.3),
    "mask": lambda q, k, v: pointwise_attention(q, k, v, attn_mask=k[:, :1, None, :, 0] > 0),
    "sigmoid": lambda q, k, v: pointwise_attention(q, k, v, activation="sigmoid_bias", length=5),
    "l1": lambda q, k, v: l1_attention(q, k, v),
    "padding": lambda q, k, v: l1_attention(q, k, v, key_padding_mask=k[:, 0, :, 0] > 0),
}


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


def inputs(dtype=torch.float32, **options):
    return torch.randn(2, N, 3, 2, D, dtype=dtype, **options).permute(2, 0, 3, 1, 4).unbind(0)  # views of a packed qkv


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(repeated, "_kept", {})


@pytest.fixture
def short(monkeypatch):
    """Counts the calls that took the short way."""
    if library_on_tensors() is None:
        pytest.skip("PyTorch shows its tensors to C from 2.10 on; before, all calls take the long way")
    taken = []
    run = repeated.run

    def counted(*arguments):
        out = run(*arguments)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(repeated, "run", counted)
    return lambda: sum(taken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_is_short_and_has_the_numbers_of_a_first_one(name, dtype, short):
    call = CALLS[name]
    call(*inputs(dtype))
    other = inputs(dtype)
    out = call(*other)
    assert short() == 1
    repeated._kept.clear()
    first = call(*other)
    assert torch.equal(out, first)
    assert out.stride() == first.stride()


def test_another_shape_stride_type_option_or_number_of_threads_is_another_call(short):
    q, k, v = inputs()
    threads = torch.get_num_threads()
    pointwise_attention(q, k, v)
    pointwise_attention(q[:, :, :3], k, v)
    pointwise_attention(q.contiguous(), k, v)
    pointwise_attention(q.half(), k.half(), v.half())
    pointwise_attention(q, k, v, scale=0.5)
    l1_attention(q, k, v)
    try:
        torch.set_num_threads(threads + 1)
        pointwise_attention(q, k, v)
    finally:
        torch.set_num_threads(threads)
    assert short() == 0


def test_what_is_wrong_stays_wrong_after_a_call_that_was_right():
    q, k, v = inputs()
    pointwise_attention(q, k, v)
    with pytest.raises(ValueError, match="activation is"):
        pointwise_attention(q, k, v, activation=["relu"])
    with pytest.raises(ValueError, match="key is a list"):
        pointwise_attention(q, [1.0], v)
    with pytest.raises(ValueError, match="dtypes"):
        pointwise_attention(q, k.double(), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_later_calls_are_those_of_a_first_one(name, dtype, short):
    call = CALLS[name]
    qkv = [x.detach().requires_grad_() for x in inputs(dtype)]
    weights = torch.randn(2, 2, N, D, dtype=dtype)
    first, *later = (torch.autograd.grad(call(*qkv), qkv, weights) for _ in range(3))
    assert short() == 2
    for gradients in later:
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(first, gradients, strict=True))


def test_gradients_from_any_gradient_of_the_output(short):
    qkv = [x.detach().requires_grad_() for x in inputs()]
    weights = torch.randn(2, 2, N, 2 * D)
    views = {
        "by head": weights[..., :D].contiguous(),
        "by token": weights[..., :D].transpose(1, 2).contiguous().transpose(1, 2),
        "part of more": weights[..., :D],
        "every second": weights[..., ::2],
        "one number": torch.ones(()).expand(2, 2, N, D),
        "mirrored": torch._neg_view(weights[..., :D]),
    }
    expected = {k: torch.autograd.grad(pointwise_attention(*qkv, impl="reference"), qkv, g) for k, g in views.items()}
    pointwise_attention(*qkv)
    for _ in range(2):
        for name, gradient in views.items():
            torch.testing.assert_close(
                torch.autograd.grad(pointwise_attention(*qkv), qkv, gradient), expected[name], msg=name
            )
    assert short() == 2 * len(views)


HOOKS = {
    "contiguous": (lambda t: t.contiguous(), lambda t: t),
    "copied": (lambda t: t.numpy().copy(), torch.from_numpy),
    "compressed": (lambda t: t.bfloat16() if t.is_floating_point() else t, lambda t: t),
    "by channel": (lambda t: t.mT.contiguous(), lambda t: t.mT),
}


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("name", ["relu", "l1"])
def test_hooks_on_saved_tensors_change_this_gradient_and_no_other(name, hooks, short):
    torch.manual_seed(0)
    packed, weights = torch.randn(2, N, 3, 2, D, requires_grad=True), torch.randn(2, 2, N, D)

    def gradient(pack=None):
        out_of = CALLS[name]
        if pack is None:
            out = out_of(*packed.permute(2, 0, 3, 1, 4))
        else:
            with torch.autograd.graph.saved_tensors_hooks(*pack):
                out = out_of(*packed.permute(2, 0, 3, 1, 4))
        return torch.autograd.grad(out, packed, weights)[0]

    first, plain = gradient(), gradient()
    hooked = gradient(HOOKS[hooks])
    torch.testing.assert_close(hooked, first, **({"rtol": 0.1, "atol": 0.1} if hooks == "compressed" else {}))
    assert torch.equal(plain, first)
    assert torch.equal(gradient(), first)
    assert short() == 3


@pytest.mark.parametrize("name", ["relu", "l1"])
def test_batched_gradients_and_gradients_without_memory(name, short):
    qkv = [x.detach().requires_grad_() for x in inputs()]
    batch = torch.randn(3, 2, 2, N, D)
    expected = [torch.autograd.grad(CALLS[name](*qkv), qkv, g) for g in batch]
    for _ in range(2):
        found = torch.autograd.grad(CALLS[name](*qkv), qkv, batch, is_grads_batched=True)
        for i, gradients in enumerate(expected):
            torch.testing.assert_close([x[i] for x in found], list(gradients))
    zero = torch._efficientzerotensor((2, 2, N, D))
    assert all(not g.any() for g in torch.autograd.grad(CALLS[name](*qkv), qkv, zero))
    assert short() == 5


REFUSED = {
    "length": (1, (True, 1.0)),
    "length_exponent": (1.0, (True,)),
    "scale": (1.0, (True,)),
    "dropout_p": (0.0, (False,)),
    "eps": (1.0, (True,)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_equals_a_kept_option_is_refused_as_on_the_first_call(name, short):
    qkv = inputs()
    call = l1_attention if name == "eps" else pointwise_attention
    taken, refused = REFUSED[name]
    for _ in range(2):
        call(*qkv, **{name: taken})
        for value in refused:
            with pytest.raises(ValueError, match=f"{name} is {value}"):
                call(*qkv, **{name: value})
    assert short() == 1


def test_gradients_of_gradients(short):
    qkv = [x.detach().requires_grad_() for x in inputs()]

    def twice():
        (first,) = torch.autograd.grad(
            pointwise_attention(*qkv, activation="gelu").square().sum(), qkv[:1], create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), qkv)

    for a, b in zip(twice(), twice(), strict=True):
        torch.testing.assert_close(a, b)
    assert short() == 1


def test_without_gradients_there_is_no_graph(short):
    qkv = [x.detach().requires_grad_() for x in inputs()]
    assert pointwise_attention(*qkv).requires_grad
    assert pointwise_attention(*qkv).requires_grad
    with torch.no_grad():
        assert not pointwise_attention(*qkv).requires_grad
    with torch.inference_mode():
        assert pointwise_attention(*qkv).is_inference()
    assert short() == 3


def test_autocast_is_short_where_it_has_nothing_to_cast(short):
    half = inputs(torch.bfloat16)
    pointwise_attention(*half)
    with torch.autocast("cpu", torch.bfloat16):
        pointwise_attention(*half)
        assert short() == 1
        assert pointwise_attention(*inputs()).dtype == torch.bfloat16
    assert short() == 1


def test_checkpointing_recomputes_a_short_call():
    qkv = [x.detach().requires_grad_() for x in inputs()]
    pointwise_attention(*qkv)
    expected = torch.autograd.grad(pointwise_attention(*qkv).square().sum(), qkv)
    out = torch.utils.checkpoint.checkpoint(pointwise_attention, *qkv, use_reentrant=False)
    found = torch.autograd.grad(out.square().sum(), qkv)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_whoever_watches_operators_sees_the_call():
    q, k, v = inputs()
    expected = pointwise_attention(q, k, v)
    with torch.profiler.profile() as profile:
        pointwise_attention(q, k, v)
    assert any("pointwise_attention" in event.name for event in profile.events())
    with Watch() as watch:
        pointwise_attention(q, k, v)
    assert watch.seen == ["formix.pointwise_attention.default"]
    with torch.autocast("cpu", torch.bfloat16):
        assert pointwise_attention(q, k, v).dtype == torch.bfloat16
    compiled = torch.compile(pointwise_attention, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q, k, v), expected)
    mirrored = torch._neg_view(q)
    assert torch.allclose(pointwise_attention(mirrored, k, v), pointwise_attention(-q, k, v))


def test_tensors_that_no_kernel_takes_go_the_long_way(short):
    q, k, v = inputs()
    pointwise_attention(q, k, v)
    assert pointwise_attention(*(x.to("meta") for x in (q, k, v))).is_meta
    with pytest.raises(ValueError, match="4 dimensions"):
        pointwise_attention(q[None], k[None], v[None])
    with pytest.raises(ValueError, match=r"query has layout torch\.sparse_coo"):
        pointwise_attention(q.to_sparse(), k, v)
    mask = torch.ones(N, N, dtype=torch.bool)
    assert torch.equal(pointwise_attention(q, k, v, attn_mask=mask), pointwise_attention(q, k, v))
    assert short() == 1


def test_a_pytorch_that_hides_its_tensors_from_c(short, monkeypatch):
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    monkeypatch.setattr(repeated, "library_on_tensors", library_on_tensors.__wrapped__)
    qkv = inputs()
    assert torch.equal(pointwise_attention(*qkv), pointwise_attention(*qkv))
    assert short() == 0


def test_several_threads_at_once_while_calls_are_forgotten(monkeypatch):
    monkeypatch.setattr(repeated, "_MOST", 3)
    cases = [torch.randn(3, 1, 2, n, 8).unbind(0) for n in range(1, 9)]
    expected = [pointwise_attention(*qkv) for qkv in cases]

    def work(first):
        for i in range(100):
            case = (first + i) % len(cases)
            assert torch.equal(pointwise_attention(*cases[case]), expected[case])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_outputs_outlive_what_was_kept_and_each_has_its_memory():
    q, k, v = inputs()
    pointwise_attention(q, k, v)
    outputs = [pointwise_attention(q * i, k, v) for i in range(1, 5)]
    repeated._kept.clear()
    for i, out in enumerate(outputs, 1):
        torch.testing.assert_close(out, pointwise_attention(q * i, k, v, impl="reference"))


def test_no_more_calls_are_kept_than_a_limit(monkeypatch):
    monkeypatch.setattr(repeated, "_MOST", 4)
    for n in range(1, 12):
        q, k, v = torch.randn(3, 1, 1, n, 8).unbind(0)
        pointwise_attention(q, k, v)
        assert sum(len(calls.gradients) for calls in repeated._kept.values()) <= 4
