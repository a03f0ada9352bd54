"""A run that is stopped and started again ends as one that was never disturbed, to the last bit."""

import json
import os
import signal

import pytest
import torch
from accelerate.utils import set_seed
from torch import nn

import formix
from formix.data.augmentation import Augmentation
from formix.training import Checkpoints, Interrupted, Step, TrainConfig, train

FULL = {
    "epochs": 3.0,
    "batch_size": 28,  # of 128 samples: the last step of an epoch has fewer
    "accumulation": 3,
    "precision": "float32",
    "evaluations": 3,
    "ema": 0.9,
    "augmentation": Augmentation(shift=1, flip=0.5, erasing=0.3, mixup=0.3, repeats=2),
}


class StoppedError(Exception):
    """What a test raises to end a run where no signal would."""


def states(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


@pytest.fixture(scope="module")
def run(digits, make_model):
    def start(checkpoints: Checkpoints | None, *, stop_at: int | None = None, send: int | None = None, **changes):
        set_seed(0)
        model, losses = make_model("softmax", proj_drop_rate=0.1, drop_path_rate=0.1), {}

        def on_step(step: Step) -> None:
            losses[step.step] = step.loss
            if step.step == stop_at:
                if send is None:
                    raise StoppedError
                os.kill(os.getpid(), send)

        config = TrainConfig(**{**FULL, **changes})
        try:
            result = train(model, digits, config, checkpoints=checkpoints, on_step=on_step)
        except (StoppedError, Interrupted) as end:
            return model, losses, end
        return model, losses, result

    return start


@pytest.fixture(scope="module")
def undisturbed(run):
    return run(None)


def test_pytorch_before_2_9_has_no_storage_for_checkpoints(monkeypatch, tmp_path):
    monkeypatch.setattr("formix.training.checkpoint.is_torch_version", lambda operation, version: operation == "<")
    with pytest.raises(ValueError, match=r"need PyTorch 2\.9 or later, and this is"):
        Checkpoints(tmp_path)


@pytest.mark.parametrize("stop_at", [1, 7, 9])
def test_the_losses_and_weights_are_those_of_an_undisturbed_run(run, undisturbed, tmp_path, stop_at):
    """In the middle of an epoch, with dropout, augmentation, accumulation and a moving average."""
    checkpoints = {"directory": tmp_path, "steps": 2, "minutes": 0}
    run(Checkpoints(**checkpoints), stop_at=stop_at)
    model, losses, result = run(Checkpoints(**checkpoints))
    whole, expected, whole_result = undisturbed
    assert losses == {step: loss for step, loss in expected.items() if step in losses}
    assert min(losses) == (stop_at - 1) // 2 * 2 + 1
    assert all(map(torch.equal, states(model), states(whole)))
    assert [(p.step, p.train_loss, p.validation) for p in result.curve] == [
        (p.step, p.train_loss, p.validation) for p in whole_result.curve
    ]
    assert result.samples == whole_result.samples


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_ends_the_run(run, undisturbed, tmp_path, number):
    _, _, end = run(Checkpoints(tmp_path, minutes=0), stop_at=7, send=number)
    assert isinstance(end, Interrupted)
    assert end.number == number
    assert signal.Signals(number).name in str(end)
    model, losses, _ = run(Checkpoints(tmp_path, minutes=0))
    assert min(losses) == 9  # the signal came after step 7, so step 8 was the last
    assert all(map(torch.equal, states(model), states(undisturbed[0])))


def test_a_finished_run_is_not_repeated(run, undisturbed, tmp_path):
    run(Checkpoints(tmp_path))
    model, losses, result = run(Checkpoints(tmp_path))
    assert not losses
    assert result.validation == undisturbed[2].validation
    assert all(map(torch.equal, states(model), states(undisturbed[0])))


def test_the_model_in_a_checkpoint_is_the_averaged_one_and_loads(run, tmp_path, digits):
    import formix

    model, _, _ = run(Checkpoints(tmp_path))
    latest = max(tmp_path.glob("step-*"))
    stored = formix.load(latest / "model")
    assert all(map(torch.equal, states(stored), states(model)))


def test_the_newest_and_the_best_are_kept(run, tmp_path):
    _, _, result = run(Checkpoints(tmp_path, keep=2, steps=1, minutes=0), evaluations=15, ema=0.0)
    best = max(result.curve, key=lambda point: (point.validation, point.step)).step
    kept = {int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()}
    assert kept == {14, 15, best}


@pytest.mark.parametrize(("change", "named"), [({"lr": 2e-3}, "lr 0.001"), ({"seed": 1}, "seed 0")])
def test_another_configuration_is_refused_and_the_field_named(run, tmp_path, change, named):
    run(Checkpoints(tmp_path, steps=2, minutes=0), stop_at=3)
    with pytest.raises(ValueError, match=f"of a run with {named} and this one has"):
        run(Checkpoints(tmp_path), **change)


def test_a_processor_that_multiplies_otherwise_is_another_configuration(run, tmp_path, monkeypatch):
    """Precision "auto" is bfloat16 on some and float32 on others."""

    def processor(fast: bool) -> None:
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: fast)

    processor(fast=False)
    run(Checkpoints(tmp_path, steps=1), stop_at=2, precision="auto")
    processor(fast=True)
    with pytest.raises(ValueError, match="precision float32 and this one has precision bfloat16"):
        run(Checkpoints(tmp_path, steps=1), precision="auto")
    _, losses, _ = run(Checkpoints(tmp_path, steps=1), precision="float32")
    assert min(losses) == 2


def test_a_loss_spike_returns_to_the_checkpoint_and_leaves_out_the_data(run, tmp_path, digits, make_model, caplog):
    from formix.training import Objective, task_objective

    normal, calls = task_objective(digits), []

    def loss(model, batch):
        calls.append(len(calls))
        return normal.loss(model, batch) * (float("nan") if len(calls) in (6, 7) else 1)

    objective = Objective(loss=loss, metric=normal.metric, higher_is_better=True)
    config = TrainConfig(epochs=3.0, batch_size=32, precision="float32", evaluations=3, on_divergence="rewind")
    result = train(make_model(), digits, config, objective=objective, checkpoints=Checkpoints(tmp_path, steps=2))
    assert result.diverged is None
    assert result.rewinds == 2
    assert "nan at step 6" in caplog.text
    assert "aside-step-000000004: the run diverged from it again" in caplog.text
    assert result.curve[-1].step == 12
    state = json.loads((max(tmp_path.glob("step-*")) / "state.json").read_text())
    # 17 batches were used, 5 without effect: the first return is to step 4, the second, from there, to step 2
    assert (state["place"]["epoch"], state["place"]["batch"]) == (4, 1)


@pytest.mark.parametrize("spoilt_at", [6, 12])  # before a checkpoint; in the last step
@pytest.mark.parametrize("on_divergence", ["rewind", "stop"])
def test_weights_that_are_no_numbers_are_never_kept(tmp_path, digits, make_model, on_divergence, spoilt_at):
    """A step makes the weights NaN, after its loss was seen to be a number."""
    from formix.training import Objective, task_objective

    normal, calls = task_objective(digits), []

    def loss(model, batch):
        calls.append(len(calls))
        zero = (model.head.bias * 0).sum()
        return normal.loss(model, batch) + (zero.sqrt() if len(calls) == spoilt_at else 0)  # 0, the gradient inf * 0

    objective = Objective(loss=loss, metric=normal.metric, higher_is_better=True)
    config = TrainConfig(
        epochs=3.0, batch_size=32, precision="float32", evaluations=3, on_divergence=on_divergence, clip=0.0
    )
    model = make_model()
    result = train(model, digits, config, objective=objective, checkpoints=Checkpoints(tmp_path, steps=2, keep=1))
    if on_divergence == "rewind":
        assert (result.diverged, result.rewinds, result.curve[-1].step) == (None, 1, 12)
        assert all(tensor.isfinite().all() for tensor in states(model))
    else:
        assert f"the weights are not finite after step {spoilt_at} " in result.diverged
        assert result.validation is None
        kept = formix.load(Checkpoints(tmp_path).open() / "model")
        assert all(tensor.isfinite().all() for tensor in states(kept))


def test_weights_that_are_spoilt_in_the_checkpoint_are_left_for_those_before(tmp_path, digits, make_model, caplog):
    """The step before a checkpoint makes the weights so large that every later loss is infinite."""
    from formix.training import Objective, task_objective

    normal, calls = task_objective(digits), []

    def loss(model, batch):
        calls.append(len(calls))
        value = normal.loss(model, batch)
        if len(calls) == 6:
            with torch.no_grad():
                model.head.bias[0] = 3e38
                model.head.bias[1] = -3e38
        return value

    objective = Objective(loss=loss, metric=normal.metric, higher_is_better=True)
    config = TrainConfig(
        epochs=3.0, batch_size=32, precision="float32", evaluations=3, on_divergence="rewind", clip=0.0
    )
    checkpoints = Checkpoints(tmp_path, steps=2, keep=9)
    model = make_model()
    result = train(model, digits, config, objective=objective, checkpoints=checkpoints)
    assert (result.diverged, result.rewinds, result.curve[-1].step) == (None, 2, 12)
    assert "aside-step-000000006: the run diverged from it again" in caplog.text
    assert all(tensor.isfinite().all() for tensor in states(model))
    assert (tmp_path / "aside-step-000000006").is_dir()
    assert Checkpoints(tmp_path).open() == tmp_path / "step-000000012"
