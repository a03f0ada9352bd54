"""The contenders compute the same function, and are charged for the operations they need."""

import pytest
import torch

from formix.benchmarks.attention import AttentionCase, fused_identity, mixer_of, plain
from formix.benchmarks.measure import measure
from formix.layers.attend import attend

SMALL = {"tokens": 24, "batch": 1, "heads": 2, "head_size": 8, "dtype": "float32"}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("h", ["relu", "relu2", "gelu", "softplus", "sigmoid", "sigmoid_bias"])
def test_the_plain_form_is_the_operator(h, causal):
    if causal and h == "sigmoid_bias":
        pytest.skip("the plain form has one length for all rows")
    mixer = mixer_of(f"relu(activation={h})")
    q, k, v = torch.randn(3, 1, 2, 24, 8)
    torch.testing.assert_close(plain(mixer)(q, k, v, causal), attend(mixer, q, k, v, is_causal=causal))


@pytest.mark.parametrize("tokens", [4, 24], ids=["fewer_tokens_than_channels", "more"])
def test_the_forms_of_sima_are_the_operator(tokens):
    q, k, v = torch.randn(3, 1, 2, tokens, 8)
    out = attend(mixer_of("sima"), q, k, v)
    torch.testing.assert_close(plain(mixer_of("sima"))(q, k, v), out)
    torch.testing.assert_close(fused_identity(q, k, v), out)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_contender_is_measured(backward, monkeypatch):
    monkeypatch.setattr(AttentionCase, "ceiling_side", 64)
    case = AttentionCase(designs=("relu", "sima"), baselines=("softmax", "naive", "matmul"), backward=backward, **SMALL)
    (found,) = measure("attention", [case], repetitions=2, seconds=0.01)
    names = {"relu", "relu, naive", "sima", "sima, naive", "softmax", "matmul"}
    assert set(found.timings) == names
    assert all(len(t.seconds) == 2 and t.rounds >= 2 and t.flops > 0 for t in found.timings.values())
    assert found.settings["tokens"] == 24
    assert found.share("relu") > 0


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_tensors_are_made_on_the_device_of_the_case(backward, monkeypatch):
    monkeypatch.setattr(AttentionCase, "ceiling_side", 64)
    baselines = ("softmax", "naive", "matmul")
    case = AttentionCase(designs=("relu", "sima"), baselines=baselines, backward=backward, device="meta", **SMALL)
    with torch.device(case.device):
        calls = case.calls()
    assert len(calls) == 6
    for name, call in calls.items():
        out = call()
        assert {t.device.type for t in (out if isinstance(out, tuple) else [out])} == {"meta"}, name
    (found,) = measure("attention", [case], repetitions=1, seconds=0.01)
    assert found.name.endswith("D=8 on meta")


def test_inputs_are_views_of_one_packed_projection_or_contiguous():
    q, k, v = AttentionCase(**SMALL)._inputs()
    assert q.shape == (1, 2, 24, 8)
    assert q.stride() == (24 * 48, 8, 48, 1)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert all(t.is_contiguous() for t in AttentionCase(layout="contiguous", **SMALL)._inputs())


def test_operations():
    case = AttentionCase(designs=("relu", "sima"), **{**SMALL, "tokens": 10})
    assert case.flops("relu") == case.flops("softmax") == case.flops("relu, naive") == 2 * 4 * 10 * 10 * 8
    assert case.flops("sima") == 2 * 4 * 10 * 8 * 8
    assert AttentionCase(causal=True, **{**SMALL, "tokens": 10}).flops("relu") == 2 * 4 * 55 * 8
    assert AttentionCase(backward=True, **SMALL).flops("relu") == 3.5 * AttentionCase(**SMALL).flops("relu")
    assert case.flops("matmul") == 2 * 2048**3
    large = AttentionCase(tokens=32768)
    assert large.flops("matmul") == pytest.approx(large.flops("relu"), rel=0.1)


WRONG = {
    "softmax": ({"designs": ("softmax",)}, "no attention of formix's"),
    "no mixer": ({"designs": ("activator",)}, "no attention of formix's"),
    "causal sima": ({"designs": ("sima",), "causal": True}, "cannot be causal"),
    "dtype": ({"dtype": "float8"}, "dtype is 'float8'"),
    "tokens": ({"tokens": 0}, "tokens is 0"),
    "baseline": ({"baselines": ("flash",)}, "baselines has 'flash'"),
    "instruction set": ({"isas": ("mmx",)}, "isas has 'mmx'"),
    "instruction set of a GPU": ({"isas": ("avx2",), "device": "cuda"}, "which is of the CPU, and device is 'cuda'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_cases(name):
    options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        AttentionCase(**{**SMALL, **options})
