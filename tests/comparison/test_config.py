import pytest

from formix.comparison import CompareConfig


def test_designs_with_options_are_told_apart():
    config = CompareConfig(designs="softmax, relu(length_exponent=0.5,activation=gelu),relu+paf")
    assert config.design_names == ["softmax", "relu(length_exponent=0.5,activation=gelu)", "relu+paf"]


def test_lists_and_numbers_of_a_yaml_file_mean_what_commas_mean():
    config = CompareConfig(designs=["softmax", "relu+paf"], lrs=[1e-3, 3e-3])
    assert config == CompareConfig(designs="softmax,relu+paf", lrs="0.001,0.003")
    assert CompareConfig(lrs=0.002).learning_rates == [2e-3]


def test_without_a_budget_there_are_ten_epochs_and_with_seconds_none():
    assert CompareConfig().epochs == 10
    assert CompareConfig(seconds=3.0).epochs is None


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"designs": "softmax,nope"}, "'nope' is no design"),
        ({"designs": " , "}, "designs is empty"),
        ({"designs": "relu,relu"}, "named twice"),
        ({"designs": "relu+sima"}, "both choose the mixer"),
        ({"seeds": 0}, "seeds is 0"),
        ({"lrs": "fast"}, "'fast'"),
        ({"lrs": "1e-3,1e-3"}, "different numbers"),
        ({"lrs": "-1e-3"}, "lrs has -0.001"),
        ({"epochs": 1.0, "seconds": 1.0}, "exactly one budget"),
        ({"batch_size": -4}, "batch_size is -4"),
        ({"threads": 0}, "threads is 0"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.replace(" ", "_"),
)
def test_wrong_values_are_named_before_anything_runs(wrong, named):
    with pytest.raises(ValueError, match=named):
        CompareConfig(**wrong)
