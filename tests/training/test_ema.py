import copy

import pytest
import torch
from torch import nn

from formix.training.ema import Ema


def model_at(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for tensor in model.state_dict().values():
        tensor.fill_(value)
    return model


def test_the_average_follows_its_formula_and_counts_integers_as_they_are():
    model = model_at(0.0)
    ema = Ema(model, 0.5)
    expected = 0.0
    for step in range(1, 30):
        for tensor in model.state_dict().values():
            tensor.fill_(step)
        ema.update(model)
        decay = min(0.5, step / (step + 9))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.weights["0.weight"], torch.full((2, 2), expected))
    torch.testing.assert_close(ema.weights["1.running_mean"], torch.full((2,), expected))
    assert ema.weights["1.num_batches_tracked"] == 29


def test_applied_weights_are_the_average_and_the_own_come_back_to_the_last_bit():
    model = model_at(0.1)
    ema = Ema(model, 0.9)
    model[0].weight.data.normal_()
    own = copy.deepcopy(model.state_dict())
    with ema.applied(model):
        assert torch.equal(model[0].weight, torch.full((2, 2), 0.1))
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(ema.weights["0.weight"], torch.full((2, 2), 0.1))
    ema.copy_to(model)
    assert torch.equal(model[0].weight, torch.full((2, 2), 0.1))


def test_a_shared_parameter_is_averaged_once():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    assert list(Ema(model, 0.9).weights) == ["a.weight"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="ema is 1"):
        Ema(model_at(0.0), 1.0)
