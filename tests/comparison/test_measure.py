"""What is measured of every design, and on which samples."""

import functools

import pytest
import torch
import torch.nn.functional as F

from formix.benchmarks import count_flops
from formix.comparison import measure
from formix.comparison.measure import flops_per_item, latencies, sample_batch, step_memory
from formix.comparison.models import build_model
from formix.data import load_data
from formix.training import TrainConfig
from formix.training.one_step import one_step
from formix.training.tasks import MODEL_INPUTS


@pytest.fixture
def sentences(tmp_path):
    folder = tmp_path / "SST-2"
    folder.mkdir()
    lengths = [1, 30, 5, 4, 1, 1, 1, 5] * 5  # words; the mean is 6
    rows = "".join(f"{' '.join(['word'] * n)}\t{i % 2}\n" for i, n in enumerate(lengths))
    for file in ("train.tsv", "dev.tsv"):
        (folder / file).write_text("sentence\tlabel\n" + rows)
    return load_data(f"glue:{folder}")


def test_sentences_are_measured_at_their_mean_length_and_the_memory_at_the_longest(sentences):
    batch = sample_batch(sentences, 2)
    assert batch["input_ids"].shape == (2, 7)  # 5 words, and the special tokens
    assert sample_batch(sentences, 2, longest=True)["input_ids"].shape == (2, 32)
    model = build_model(sentences, None, {}, "softmax")
    one = {name: batch[name][:1] for name in MODEL_INPUTS}
    assert flops_per_item(model, sentences) == count_flops(model, one)


def test_a_batch_is_as_large_as_it_says_where_there_are_fewer_samples():
    data = load_data("digits", limit=20)
    batch = sample_batch(data, 32)
    assert len(batch["labels"]) == 32
    assert torch.equal(batch["pixel_values"][20:], batch["pixel_values"][:12])
    model = build_model(data, None, {}, "softmax")
    assert step_memory(model, data, 32, "float32") == step_memory(model, data, 20, "float32")  # training has no larger


def test_latency_is_of_the_device_that_the_models_are_on(monkeypatch):
    computed = []
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: computed.append(x) or F.linear(x, self.weight))
    data = load_data("digits", limit=8)
    found = latencies({"relu": build_model(data, None, {"depth": 1}, "relu").to("meta")}, data)
    assert set(found["relu"]) == {"float32", "bfloat16"}
    assert {(x.device.type, x.dtype) for x in computed} == {("meta", torch.float32), ("meta", torch.bfloat16)}


def test_training_steps_are_those_of_the_run_and_the_designs_are_taken_in_turn(monkeypatch):
    made = []

    def build(name):
        made.append(name)
        return build_model(data, None, {"depth": 1}, name)

    data, config = load_data("digits", limit=24), TrainConfig(batch_size=32, accumulation=2, precision="float32")
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    designs = {name: functools.partial(build, name) for name in ("softmax", "relu", "sima")}
    speeds = measure.training_speeds(designs, data, config)
    assert sorted(made) == ["relu", "sima", "softmax", "softmax"]  # two at a time
    assert list(speeds) == list(designs)
    assert min(speeds.values()) > 0
    assert measure.training_speeds({"relu": designs["relu"]}, data, config)["relu"] > 0
    model = build("relu")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    step = one_step(model, data, config)
    assert step.samples == len(step.batch["labels"]) == 16  # a part of the batch
    step.take()
    assert not any(torch.equal(before[name], weight) for name, weight in model.named_parameters())
