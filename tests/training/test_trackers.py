import importlib.util

import pytest

from formix.training import TrainConfig
from formix.training.trackers import NAMES, Trackers, check_trackers, flattened


def test_a_configuration_becomes_plain_values():
    flat = flattened(TrainConfig())
    assert flat["augmentation.mixup"] == 0.0
    assert flat["lr"] == 1e-3
    assert flat["seconds"] == "None"
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())


def test_tensorboard_has_every_figure(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard, an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(["tensorboard"], tmp_path, TrainConfig())
    for step in (1, 2):
        trackers.log({"train loss": 1 / step, "lr": 1e-3}, step)
    trackers.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train loss")] == [(1, 1.0), (2, 0.5)]
    assert "lr" in events.Tags()["scalars"]


def test_nothing_is_tracked_by_default(tmp_path):
    trackers = Trackers([], tmp_path, TrainConfig())
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert not list(tmp_path.iterdir())


def test_unknown_and_missing_trackers_are_named(monkeypatch):
    with pytest.raises(ValueError, match="'notebook' is no tracker; formix knows tensorboard, trackio, wandb, mlflow"):
        check_trackers(["notebook"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in NAMES:
        with pytest.raises(ValueError, match=f"{name!r} is not installed; pip install"):
            check_trackers([name])
