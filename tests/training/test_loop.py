import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import set_seed

import formix
from formix.data.augmentation import Augmentation
from formix.training import Checkpoints, Objective, TrainConfig, evaluate, forward, train


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def run(digits, make_model):
    def run_one(design: str = "softmax", *, model_seed: int = 0, **config):
        set_seed(model_seed)
        model = make_model(design)
        settings = {"epochs": 2.0, "batch_size": 32, "precision": "float32", "evaluations": 2, **config}
        return model, train(model, digits, TrainConfig(**settings))

    return run_one


@pytest.mark.parametrize("design", formix.list_designs())
def test_every_design_learns(run, design):
    _, result = run(design, epochs=12.0, lr=5e-3)
    assert result.diverged is None
    assert result.curve[-1].train_loss < 0.85 * result.curve[0].train_loss
    assert result.validation > 0.2


def test_the_same_seed_twice_gives_the_same_weights_to_the_last_bit(run):
    (first, a), (second, b) = run(precision="bfloat16"), run(precision="bfloat16")
    assert torch.equal(weights(first), weights(second))
    assert [p.validation for p in a.curve] == [p.validation for p in b.curve]


def test_another_seed_gives_other_batches(run):
    assert not torch.equal(weights(run(seed=0)[0]), weights(run(seed=1)[0]))


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(run):
    whole, parts = run(epochs=1.0)[0], run(epochs=1.0, accumulation=4)[0]
    torch.testing.assert_close(weights(whole), weights(parts), atol=2e-4, rtol=0)
    assert not torch.equal(weights(whole), weights(run(epochs=1.0, batch_size=8)[0]))


def test_the_curve_has_the_asked_points_and_the_budget_is_kept(run, digits):
    _, result = run(epochs=2.0, evaluations=4)
    steps = math.ceil(len(digits.train) / 32)
    assert [p.step for p in result.curve] == [steps // 2, steps, 3 * steps // 2, 2 * steps]
    assert result.curve[-1].epoch == 2
    assert result.samples == 2 * len(digits.train)


def test_progress_reaches_one_and_never_falls(run, digits, make_model):
    seen: list[float] = []
    config = TrainConfig(epochs=1.0, batch_size=32, precision="float32")
    train(make_model(), digits, config, on_step=lambda step: seen.append(step.progress))
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_a_budget_in_seconds_ends_the_run(run):
    _, result = run(epochs=None, seconds=0.5)
    assert 0.5 <= result.seconds < 5


@pytest.mark.parametrize("seconds", [2.0, 2.1, 2.2, 2.3])
def test_a_run_of_seconds_is_evaluated_whichever_look_at_the_clock_finds_them_spent(run, monkeypatch, seconds):
    looks = itertools.count()
    monkeypatch.setattr("formix.training.clock.time", SimpleNamespace(perf_counter=lambda: 0.1 * next(looks)))
    _, result = run(epochs=None, seconds=seconds)
    assert result.curve[-1].step * 32 == result.samples
    assert result.validation == result.curve[-1].validation


def test_a_loss_that_is_no_number_ends_the_run_and_says_where(digits, make_model):
    model = make_model()
    with torch.no_grad():
        model.head.weight.fill_(float("inf"))
    result = train(model, digits, TrainConfig(lr=0.5, epochs=1.0, batch_size=32, precision="float32"))
    assert result.diverged == "the loss became nan at step 1 with learning rate 0.5"
    assert result.validation is None
    assert result.samples == 32


def test_weights_that_the_last_step_broke_end_the_run_and_are_not_written(digits, make_model, tmp_path):
    """Of one step, so that no later loss can tell."""
    config = TrainConfig(epochs=1.0, lr=10, optimizer="sgd", warmup=0.0, clip=0.0, batch_size=4096, precision="float32")
    objective = Objective(
        loss=lambda model, batch: model.head.bias.sum() * 3e38, metric=lambda model: 1.0, higher_is_better=True
    )
    checkpoints = Checkpoints(tmp_path)
    result = train(make_model(), digits, config, objective=objective, checkpoints=checkpoints)
    assert result.diverged == ("the weights are not finite after step 1 with learning rate 10 (head.bias is the first)")
    assert result.validation is None
    assert checkpoints.latest is None


def test_biases_and_norms_are_not_decayed(run, make_model, digits):
    model = make_model()
    with torch.no_grad():
        model.fc_norm.weight.fill_(1.0)
    frozen = [p for n, p in model.named_parameters() if "fc_norm" not in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    with torch.no_grad():
        model.head.weight.zero_()  # no gradient reaches the norm, so only decay could change it
    config = TrainConfig(epochs=1.0, batch_size=128, weight_decay=0.9, lr=1e-5, warmup=0.0, precision="float32")
    train(model, digits, config)
    torch.testing.assert_close(model.fc_norm.weight, torch.ones_like(model.fc_norm.weight), atol=1e-3, rtol=0)


def test_an_objective_replaces_loss_and_metric(digits, make_model):
    def distance(model, batch):
        return (forward(model, batch) - 1).square().mean()

    batch = digits.validation.__getitems__(range(16))
    objective = Objective(loss=distance, metric=lambda model: distance(model, batch).item(), higher_is_better=False)
    model = make_model()
    before = distance(model, batch).item()
    config = TrainConfig(epochs=6.0, lr=1e-2, batch_size=32, precision="float32")
    result = train(model, digits, config, objective=objective)
    assert result.validation < before / 2
    assert result.validation == pytest.approx(distance(model.eval(), batch).item())


EVERYTHING = Augmentation(
    crop=0.5, flip=0.5, policy="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0, repeats=2
)


def test_augmented_training_with_a_moving_average_is_repeatable_to_the_last_bit(run):
    (first, a), (second, b) = (run(augmentation=EVERYTHING, ema=0.9, accumulation=2, epochs=1.0) for _ in range(2))
    assert torch.equal(weights(first), weights(second))
    assert a.curve == [dataclasses.replace(p, seconds=q.seconds) for p, q in zip(b.curve, a.curve, strict=True)]
    assert not torch.equal(weights(first), weights(run(accumulation=2, epochs=1.0, ema=0.9)[0]))


def test_the_model_ends_with_the_averaged_weights_which_are_what_is_evaluated(run, digits):
    model, result = run(ema=0.9, epochs=3.0)
    plain, _ = run(epochs=3.0)
    assert not torch.equal(weights(model), weights(plain))
    assert result.validation == evaluate(model, digits, "validation")


def test_recomputed_activations_change_nothing(run):
    assert torch.equal(weights(run(epochs=1.0)[0]), weights(run(epochs=1.0, activation_checkpointing=True)[0]))


def test_float16_is_scaled_and_close_to_float32(run):
    half, result = run(epochs=1.0, precision="float16")
    assert result.diverged is None
    torch.testing.assert_close(weights(half), weights(run(epochs=1.0)[0]), atol=5e-3, rtol=0)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_other_optimisers_learn(run, optimizer):
    _, result = run(epochs=12.0, optimizer=optimizer, lr=0.3 if optimizer == "sgd" else 5e-3)
    assert result.curve[-1].train_loss < 0.85 * result.curve[0].train_loss


def test_a_model_without_numbered_blocks_cannot_recompute(digits):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with pytest.raises(ValueError, match="cannot recompute"):
        train(model, digits, TrainConfig(activation_checkpointing=True))
