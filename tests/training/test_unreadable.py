"""Runs on pictures of which some cannot be read: refused in one sentence, or left out and counted, and exact."""

import csv
import json
import os
import signal

import pytest
from data.test_folder import draw, tree
from safetensors.torch import load_file
from training import distributed_run

import formix
from formix.cli import main
from formix.data import load_data
from formix.training import TrainConfig, train
from formix.training.job import MetricsFile

SMALL = [
    "--design=relu", "--epochs=3", "--batch-size=16", "--accumulation=2", "--augmentation.flip=0.5", "--threads=1",
    '--model_args={"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4}', "--precision=float32",
    "--log-steps=1", "--evaluations=1",
]  # fmt: skip
BAD = ("train/bird/03.png", "train/dog/07.png", "val/cat/05.png")
COUNTS = {"train": 2, "test": 1}


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """60 and 60 pictures of 8 x 8: one is cut short, one empty, one a text."""
    root = tree(tmp_path_factory.mktemp("unreadable") / "pets", "train", "val", each=20, size=(8, 8))
    image = root / "image.jpg"
    draw(image, 1)
    for path, content in zip(BAD, (image.read_bytes()[:-100], b"", b"not an image"), strict=True):
        (root / path).unlink()
        (root / path).with_suffix(".jpg").write_bytes(content)
    image.unlink()
    return root


@pytest.fixture(scope="module", params=["folder", "stream"])
def data(request, pets, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORMIX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield f"{request.param}:{pets}"


def command(data, out, *flags):
    return ["train", f"--data={data}", *SMALL, f"--out={out}", *flags]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(command(data, out, "--on-bad-sample=skip")) == 0
    return out


def rows(out):
    with (out / "metrics.csv").open() as file:
        return [row | {"seconds": ""} for row in csv.DictReader(file)]


def test_a_run_is_refused_in_one_sentence(data, tmp_path, capsys):
    assert main(command(data, tmp_path / "out")) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "/train/bird/03.jpg' cannot be read" in said[0] or "/train/dog/07.jpg' cannot be read" in said[0]
    assert "on_bad_sample=skip" in said[0]


def test_skipped_samples_are_counted_and_evaluated_without(data, undisturbed, tmp_path, capsys, caplog):
    assert json.loads((undisturbed / "result.json").read_text())["skipped"] == COUNTS
    assert main(command(data, tmp_path / "out", "--on-bad-sample=skip", "--epochs=1")) == 0
    assert "Samples that could not be read and were left out: 3" in capsys.readouterr().out
    assert "2 of train, 1 of test: " in caplog.text
    assert main(["eval", str(undisturbed), "--json=true"]) == 0  # the choice is the run's
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["skipped"]) == (59, COUNTS)
    assert found["value"] == json.loads((undisturbed / "result.json").read_text())["test"]


def test_a_run_goes_on_in_the_middle_of_an_epoch_to_the_same_bits(data, undisturbed, tmp_path, monkeypatch):
    add = MetricsFile.add

    def add_and_stop(self, step):
        add(self, step)
        if step.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsFile, "add", add_and_stop)
    again = command(data, tmp_path / "out", "--on-bad-sample=skip")
    assert main(again) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert main(again) == 0
    assert rows(tmp_path / "out") == rows(undisturbed)
    one, other = (load_file(out / "model" / "model.safetensors") for out in (undisturbed, tmp_path / "out"))
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("data", ["stream"], indirect=True, scope="module")
def test_two_processes_agree_on_the_batches(data, undisturbed, tmp_path):
    arguments = command(data, tmp_path / "out", "--on-bad-sample=skip")
    for child in distributed_run.launch_command(2, tmp_path / "said", arguments):
        child.join(120)
        assert child.exitcode == 0
    said = [(tmp_path / "said" / str(process)).read_text() for process in range(2)]
    assert ["cannot be read" in text for text in said] == [True, False]
    for ours, theirs in zip(rows(tmp_path / "out"), rows(undisturbed), strict=True):
        assert ours["samples"] == theirs["samples"]
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), abs=1e-5)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["skipped"] == COUNTS


def test_processes_that_read_different_data_are_refused(digits, make_model, monkeypatch):
    monkeypatch.setattr("formix.training.loop.gathered", lambda value: [value, "another"])
    with pytest.raises(ValueError, match="processes of this run read different data as 'digits'"):
        train(make_model(), digits, TrainConfig(epochs=1.0))


def test_comparisons_skip_them(pets, tmp_path):
    flags = ["--designs=softmax,relu", "--seeds=1", "--epochs=1", "--latency=false", *SMALL[-4:-3]]
    arguments = ["compare", f"--data=folder:{pets}", *flags, f"--out={tmp_path / 'out'}"]
    assert main(arguments) == 2
    assert main([*arguments, "--on-bad-sample=skip"]) == 0
    task = json.loads((tmp_path / "out" / "results.json").read_text())["task"]
    assert task["splits"]["test"] == 59
    assert f"skipped: {COUNTS}" in task["provenance"]


def test_recovery_skips_them(pets, tmp_path):
    sizes = {"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    formix.save(formix.create_model("vit_tiny_patch16_224", "softmax", **sizes), tmp_path / "source")
    place = f"folder:{pets}"
    arguments = [
        "convert", str(tmp_path / "source"), "--design=relu", f"--recover={place}", f"--probe={place}",
        f"--out={tmp_path / 'out'}",
    ]  # fmt: skip
    recovery = {"stages": "match:2steps", "calibration": 1, "batch_size": 8, "evaluations": 1}
    assert main([*arguments, f"--recovery={json.dumps(recovery)}"]) == 2
    assert main([*arguments, f"--recovery={json.dumps(recovery | {'on_bad_sample': 'skip'})}"]) == 0
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["data"][0]["skipped"] == COUNTS
    assert len(load_data(place, on_bad_sample="skip").test) == 59
