import re

import pytest
import torch
from torch import nn

import formix
from formix.training import TrainConfig
from formix.training.optimizers import make_optimizer, set_learning_rate


def group_of(optimizer, parameter):
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_the_optimisers_are_torchs_fused_ones(make_model, name, kind):
    optimizer = make_optimizer(make_model(), TrainConfig(optimizer=name, beta1=0.8, beta2=0.95, eps=1e-6))
    assert type(optimizer) is kind
    assert optimizer.defaults["fused"]
    first = optimizer.defaults["momentum"] if name == "sgd" else optimizer.defaults["betas"][0]
    assert first == 0.8
    if name != "sgd":
        assert (optimizer.defaults["betas"][1], optimizer.defaults["eps"]) == (0.95, 1e-6)


def test_matrices_are_decayed_and_biases_norms_and_positions_are_not(make_model):
    model = make_model()
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.1))
    assert group_of(optimizer, model.blocks[0].attn.qkv.weight)["weight_decay"] == 0.1
    for parameter in (model.blocks[0].attn.qkv.bias, model.blocks[0].norm1.weight, model.pos_embed):
        assert group_of(optimizer, parameter)["weight_decay"] == 0


def test_independent_decay_shrinks_weights_by_decay_times_schedule():
    model = nn.Linear(3, 3, bias=False)
    before = model.weight.detach().clone()
    optimizer = make_optimizer(model, TrainConfig(lr=1e-3, weight_decay=1e-2, independent_decay=True))
    model.weight.grad = torch.zeros_like(model.weight)
    set_learning_rate(optimizer, 1e-3 * 0.5)  # in the middle of a cosine
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before * (1 - 1e-2 * 0.5))


@pytest.mark.parametrize("name", ["vit", "bert-tiny", "gpt2-nano"])
def test_layer_decay_falls_by_its_factor_from_layer_to_layer(make_model, name):
    if name == "vit":
        model = make_model(depth=3)
        layers, stem, head = model.blocks, model.patch_embed.proj.weight, model.head.weight
    else:
        model = formix.create_model(name, "paf", vocab_size=64, num_labels=2)
        trunk = model.bert.encoder.layer if name == "bert-tiny" else model.transformer.h
        stem = model.bert.embeddings.word_embeddings.weight if name == "bert-tiny" else model.transformer.wte.weight
        layers, head = trunk, (model.classifier.weight if name == "bert-tiny" else model.score.weight)
    optimizer = make_optimizer(model, TrainConfig(layer_decay=0.5, lr=1e-2))
    set_learning_rate(optimizer, 1e-2)
    rates = [group_of(optimizer, next(layer.parameters()))["lr"] for layer in layers]
    depth = len(layers)
    assert rates == pytest.approx([1e-2 * 0.5 ** (depth - i) for i in range(depth)])
    assert group_of(optimizer, head)["lr"] == pytest.approx(1e-2)
    assert group_of(optimizer, stem)["lr"] == pytest.approx(1e-2 * 0.5 ** (depth + 1))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_layer_decay_counts_the_layers_of_all_stages():
    sizes = {"embed_dim": [4, 4, 8], "depth": [1, 2, 1], "num_heads": [1, 1, 2]}
    model = formix.create_model("cvt-13", "relu", in_chans=1, num_classes=10, **sizes)
    optimizer = make_optimizer(model, TrainConfig(layer_decay=0.5, lr=1.0))
    set_learning_rate(optimizer, 1.0)
    rates = {}
    for name, parameter in model.named_parameters():
        if found := re.match(r"cvt\.encoder\.stages\.(\d)\.(?:layers\.(\d))?", name):
            rates.setdefault(found.groups(), set()).add(group_of(optimizer, parameter)["lr"])
    order = [("0", None), ("0", "0"), ("1", None), ("1", "0"), ("1", "1"), ("2", None), ("2", "0")]
    assert rates == {place: {0.5 ** (len(order) - number)} for number, place in enumerate(order)}
    assert group_of(optimizer, model.classifier.weight)["lr"] == 1.0


def test_layer_decay_of_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="a Linear does not say"):
        make_optimizer(nn.Linear(2, 2), TrainConfig(layer_decay=0.7))
