"""The big registered models at their full size: one forward pass each, in their own designs.

The memory of 1.6 G parameters and the time to draw them are saved: every parameter is a window of its own into one
vector of random numbers.
"""

import accelerate
import pytest
import torch
from torch import nn

import formix

# millions of parameters where the paper's code was counted; None: the keys and shapes are in test_sima.py
SIMA = {
    "sima_tiny_24_p16": 12.12,
    "sima_small_24_p16": 47.67,
    "sima_medium_24_p16": 84.40,
    "sima_large_24_p16": 189.1,
    "sima_nano_12_p8": None,
    "sima_tiny_12_p8": None,
    "sima_small_12_p8": 26.21,
    "sima_tiny_24_p8": None,
    "sima_small_24_p8": None,
    "sima_medium_24_p8": None,
    "sima_large_24_p8": None,
}
RELU_VIT = {  # width C, depth, MLP width, patch size, heads
    "relu_vit_large_patch16_224": (1024, 24, 4096, 16, 16),
    "relu_vit_small_patch8_224": (384, 12, 1536, 8, 6),
}
TEXT = {  # design, arguments, parameters of the published models
    "bert-large-uncased": ("paf", {"task": "features"}, 335_141_888 - 24 * 2 * 1024),  # one norm fewer per layer
    "roberta-large": ("paf(official=true)", {"task": "features"}, 354_310_144 + 1024 * 1025),  # the code's; a pooler
    "gpt2-large": ("relu", {}, 774_030_080),
    "gpt2-xl": ("skip", {}, 1_557_611_200),
    "llama-1.1b": ("relu+skip", {}, 1_100_048_384),
}


def with_random_weights(create):
    """The model that `create` makes, with windows into one vector of N(0, 0.02) as weights; norms are around 1."""
    with accelerate.init_empty_weights(include_buffers=False):
        model = create()
    longest = max(p.numel() for p in model.parameters())
    pool = torch.randn(longest + 100_003) * 0.02
    start = 0
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                start = (start + 7919) % 100_003  # both are prime: the windows start at different places
                weight = pool[start : start + p.numel()].view(p.shape)
                if p.dim() == 1 and name != "bias":
                    weight = 1 + weight
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def check(logits, shape):
    assert logits.shape == shape
    assert logits.isfinite().all()
    assert logits.std() > 0


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", SIMA)
def test_sima(name):
    model = with_random_weights(lambda: formix.create_model(name))
    if SIMA[name] is not None:
        assert count(model) / 1e6 == pytest.approx(SIMA[name], rel=1.1e-3)
    with torch.inference_mode():
        check(model(torch.randn(1, 3, 64, 64)), (1, 1000))


@pytest.mark.slow
@pytest.mark.parametrize("name", RELU_VIT)
def test_relu_vit(name):
    model = with_random_weights(lambda: formix.create_model(name))
    c, depth, mlp, patch, heads = RELU_VIT[name]
    attention = 4 * c * (c + 1) + 2 * c // heads  # projections, and the scales of query and key norms
    layer = 4 * c + attention + c * mlp + mlp + mlp * c + c
    embedding = (3 * patch**2 + 1) * c + (224 // patch) ** 2 * c
    assert count(model) == embedding + depth * layer + 2 * c + 1000 * (c + 1)
    with torch.inference_mode():
        check(model(torch.randn(1, 3, 224, 224)), (1, 1000))


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT)
def test_text(name):
    design, arguments, parameters = TEXT[name]
    model = with_random_weights(lambda: formix.create_model(name, design, **arguments))
    assert count(model) == parameters
    with torch.inference_mode():
        out = model(torch.randint(0, model.config.vocab_size, (1, 8)))
    if arguments.get("task") == "features":
        check(out.last_hidden_state, (1, 8, model.config.hidden_size))
    else:
        check(out.logits, (1, 8, model.config.vocab_size))
