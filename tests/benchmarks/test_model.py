import pytest
import torch
import torch.nn.functional as F

from formix.benchmarks.measure import measure
from formix.benchmarks.memory import peak_growth
from formix.benchmarks.model import BlockCase, ModelCase
from formix.benchmarks.profile import PARTS, profile_parts
from formix.layers import Block

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_a_vision_transformer_against_timms_own(training):
    case = ModelCase(
        model="vit_tiny_patch16_224", designs=("relu", "sima"), batch=2, training=training, model_args=TINY,
        precision="autocast", profiled=True,
    )  # fmt: skip
    assert type(case.models()["softmax"]).__module__.startswith("timm.")
    (found,) = measure("model", [case], repetitions=1, seconds=0.01)
    assert list(found.timings) == list(found.profile) == ["softmax", "relu", "sima"]
    for parts in found.profile.values():
        assert set(parts) <= set(PARTS)
        assert {"qkv projection", "attention", "output projection", "MLP", "norms"} <= set(parts)
        assert ("optimizer" in parts) is training
    assert found.timings["relu"].flops > 0


@pytest.mark.parametrize("model", ["gpt2-nano", "bert-tiny", "llama-nano"])
def test_a_text_model(model):
    case = ModelCase(model=model, batch=1, tokens=8, training=True, precision="float32", profiled=True)
    (found,) = measure("model", [case], repetitions=1, seconds=0.01)
    assert set(found.timings) == {"softmax", "relu"}
    for parts in found.profile.values():
        assert set(PARTS) == set(parts)


def test_blocks():
    case = BlockCase(tokens=9, batch=1, dim=32, heads=2, training=True, designs=("relu", "softmax", "activator"))
    (found,) = measure("block", [case], repetitions=1, seconds=0.01)
    assert list(found.timings) == ["softmax", "relu", "activator"]


@pytest.mark.parametrize(
    "case",
    [
        BlockCase(tokens=9, batch=1, dim=32, heads=2, training=True, device="meta"),
        ModelCase(model="vit_tiny_patch16_224", model_args=TINY, device="meta"),
    ],
    ids=["block", "model"],
)
def test_models_are_made_on_the_device_of_the_case(case, monkeypatch):
    computed = []
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: computed.append(x) or F.linear(x, self.weight))
    (found,) = measure("model", [case], repetitions=1, seconds=0.01)
    assert list(found.timings) == ["softmax", "relu"]
    assert {x.device.type for x in computed} == {"meta"}
    assert found.name.endswith("on meta")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "int8"),
        ({"designs": ("nope",)}, "nope"),
        ({"device": "cuda", "profiled": True}, "profile tells where the CPU's time goes"),
    ],
)
@pytest.mark.parametrize("kind", [ModelCase, BlockCase])
def test_wrong_cases(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_the_profile_gives_gradients_to_the_part_of_their_operator():
    layer, x = Block(256, 4), torch.randn(1, 512, 256)
    forward, both = [], []
    for _ in range(5):  # other processes only add to the time, so that the least of several is the layer's own
        forward.append(profile_parts(layer, lambda: layer(x)))
        both.append(profile_parts(layer, lambda: layer(x).sum().backward()))
    assert set(forward[0]) == {"qkv projection", "attention", "output projection", "MLP", "norms", "rest"}
    assert min(parts["MLP"] for parts in both) > 1.3 * min(parts["MLP"] for parts in forward)


def test_peak_memory_sees_what_is_freed_again():
    grown = peak_growth(lambda: torch.ones(64 << 18).sum())
    if grown is None:
        pytest.skip("this system does not say")
    assert 60 << 20 < grown < 100 << 20


def test_a_profile_of_layers_that_are_not_known_is_refused_before_timing():
    case = ModelCase(model="vit_small_patch16_18x2_224", model_args=TINY, precision="float32", profiled=True)
    with pytest.raises(ValueError, match="no layers that formix can look into"):
        case.calls()
