import copy

import pytest
import torch

from formix.benchmarks import count_flops
from formix.data import load_data
from formix.data.augmentation import Augmentation
from formix.training import TrainConfig
from formix.training.plan import plan


def test_the_figures_are_those_of_the_model_and_the_budget(digits, make_model):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    config = TrainConfig(epochs=2.5, batch_size=32, accumulation=2, precision="float32", ema=0.9)
    figures = plan(model, digits, config)
    assert figures.parameters == figures.trainable == sum(p.numel() for p in model.parameters())
    assert figures.flops_per_sample == count_flops(model, digits.train[0]["pixel_values"][None])
    assert figures.flops == 3 * 2.5 * len(digits.train) * figures.flops_per_sample
    assert figures.steps == 10
    assert figures.memory > 4 * 4 * figures.parameters
    assert figures.seconds == pytest.approx(2.5 * len(digits.train) / figures.samples_per_second)
    assert figures.seconds_per_step == pytest.approx(32 / figures.samples_per_second)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert "10 steps" in str(figures)
    assert f"{figures.parameters:,}" in str(figures)


def test_a_budget_in_seconds_and_frozen_weights(digits, make_model):
    model = make_model()
    model.blocks.requires_grad_(False)
    augmentation = Augmentation(mixup=0.8, flip=0.5)
    figures = plan(model, digits, TrainConfig(epochs=None, seconds=90.0, augmentation=augmentation))
    assert figures.seconds == 90
    assert figures.steps is figures.flops is None
    assert figures.trainable < figures.parameters
    assert "90 seconds for as many steps as fit" in str(figures)


def test_the_memory_is_that_of_the_largest_part_of_a_batch(digits, make_model):
    parts = TrainConfig(batch_size=10, accumulation=3, precision="float32")  # of 4, 4 and 2 samples
    whole = TrainConfig(batch_size=4, precision="float32")
    assert plan(make_model(), digits, parts).memory == plan(make_model(), digits, whole).memory


def test_the_memory_has_the_optimiser_and_the_average_of_the_settings(digits, make_model):
    model, settings = make_model(), {"batch_size": 2, "precision": "float32"}
    weights = 4 * sum(p.numel() for p in model.parameters())
    adamw = plan(model, digits, TrainConfig(**settings)).memory
    assert plan(model, digits, TrainConfig(**settings, ema=0.9)).memory == adamw + weights
    one_moment_less = adamw - plan(model, digits, TrainConfig(**settings, optimizer="sgd")).memory
    assert one_moment_less == pytest.approx(weights, rel=0.01)  # AdamW also counts its steps


def test_a_step_is_of_no_more_samples_than_there_are(digits, make_model):
    size = len(digits.train)
    figures = plan(make_model(), digits, TrainConfig(batch_size=10 * size, precision="float32"))
    assert figures.seconds_per_step == pytest.approx(size / figures.samples_per_second)


def test_recomputing_activations_takes_less_memory(digits, make_model):
    model, settings = make_model(depth=8), {"batch_size": 64, "precision": "float32"}
    whole = plan(model, digits, TrainConfig(**settings))
    less = plan(model, digits, TrainConfig(**settings, activation_checkpointing=True))
    assert less.memory < 0.8 * whole.memory
    assert not model.blocks.grad_checkpointing


def test_text_has_a_plan(tmp_path):
    import formix

    (tmp_path / "a.txt").write_text("words and words " * 200)
    data = load_data(f"text:{tmp_path / 'a.txt'}", sequence_length=16)
    model = formix.create_model("gpt2-nano", vocab_size=256, n_positions=16, n_layer=1)
    figures = plan(model, data, TrainConfig(epochs=1.0, batch_size=16))
    assert figures.flops_per_sample == count_flops(model, {"input_ids": data.train[0]["input_ids"][None]})
