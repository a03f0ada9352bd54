import math

import pytest

from formix.training import TrainConfig


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine_to_zero():
    config = TrainConfig(warmup=0.2)
    assert config.lr_factor(0.1) == pytest.approx(0.5)
    assert config.lr_factor(0.2) == 1
    assert config.lr_factor(0.6) == pytest.approx(0.5)
    assert config.lr_factor(1.0) == pytest.approx(0)
    assert all(config.lr_factor(p / 100) >= config.lr_factor((p + 1) / 100) for p in range(20, 100))
    assert TrainConfig(warmup=0.0).lr_factor(0.0) == 1


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"epochs": None}, "budget"),
        ({"seconds": 1.0}, "epochs is 10.0 and seconds is 1.0; give exactly one budget, and null for"),
        ({"epochs": -1.0}, "epochs is -1"),
        ({"epochs": math.nan}, "epochs is nan"),
        ({"lr": 0.0}, "lr is 0"),
        ({"lr": 1e9}, "learning rate"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 4, "accumulation": 8}, "accumulation is 8"),
        ({"warmup": 1.0}, "warmup is 1"),
        ({"clip": -1.0}, "clip is -1"),
        ({"precision": "float8"}, "'float8'"),
        ({"optimizer": "lion"}, "'adamw', 'adam' or 'sgd'"),
        ({"loss": "hinge"}, "loss is 'hinge'"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"schedule": "rsqrt", "warmup": 0.0}, "what its decay is measured in"),
        ({"cooldown": 0.2}, "a cosine falls by itself"),
        ({"schedule": "constant", "warmup": 0.6, "cooldown": 0.6}, "more than the whole run"),
        ({"layer_decay": 0.0}, "layer_decay is 0"),
        ({"ema": 1.0}, "ema is 1"),
        ({"seed": -1}, "seed is -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        TrainConfig(**wrong)
