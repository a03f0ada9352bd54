"""A damaged checkpoint is never used in silence: its file is named and the one before it taken; nothing is executed."""

import logging
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file

from formix.training import Checkpoints, TrainConfig, train
from formix.training.checkpoint import damage


@pytest.fixture(scope="module")
def run(digits, make_model):
    def start(directory: Path, **changes):
        set_seed(0)
        model = make_model("relu")
        config = {"epochs": 2.0, "batch_size": 64, "precision": "float32", "evaluations": 2, "ema": 0.9, **changes}
        result = train(model, digits, TrainConfig(**config), checkpoints=Checkpoints(directory, minutes=0))
        return model, result

    return start


@pytest.fixture(scope="module")
def original(run, tmp_path_factory) -> Path:
    """Two checkpoints, of steps 2 and 4; the second is the end of the run."""
    directory = tmp_path_factory.mktemp("original")
    run(directory)
    assert [path.name for path in sorted(directory.iterdir())] == ["step-000000002", "step-000000004"]
    return directory


def files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def damaged(path: Path) -> Iterator[str]:
    """Truncate, alter and delete a file, in turn, at many places; the file is whole again after each."""
    content = path.read_bytes()
    size = len(content)
    for place in sorted({0, 1, size // 4, size // 2, size - 2, size - 1}):
        path.write_bytes(content[:place])
        yield f"cut to {place} bytes"
    for place in sorted({0, 1, 7, 8, size // 3, size // 2, size - 2, size - 1}):
        for bit in (0, 5):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            yield f"bit {bit} of byte {place} flipped"
    path.write_bytes(content + b" ")
    yield "one byte longer"
    path.unlink()
    yield "deleted"
    path.write_bytes(content)


def test_every_damage_to_every_file_is_seen(original, tmp_path):
    """Over a hundred cases; the newest intact checkpoint is then the one before."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(original, directory)
    newest, before = directory / "step-000000004", directory / "step-000000002"
    assert damage(newest) is None
    cases = 0
    for path in files(newest):
        whole = path.read_bytes()
        for case in damaged(path):
            problem = damage(newest)
            # the one thing that may change without harm is white space between the manifest's entries
            harmless = path.name == "manifest.json" and case.startswith(("cut", "one"))
            assert problem is not None or harmless, (path, case)
            if problem is not None:
                assert "\n" not in problem
                assert Checkpoints(directory).open() == before, (path, case)
                (directory / f"aside-{newest.name}").rename(newest)
            cases += 1
        assert path.read_bytes() == whole
    assert cases >= 100
    assert Checkpoints(directory).open() == newest


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "random/0.json", "training", "model/config.json"])
def test_the_run_goes_on_from_the_one_before_and_ends_the_same(run, original, tmp_path, name, caplog):
    directory = tmp_path / "checkpoints"
    shutil.copytree(original, directory)
    path = directory / "step-000000004" / name
    path = next(path.iterdir()) if path.is_dir() else path
    path.write_bytes(path.read_bytes()[:-20])
    before = {p: p.read_bytes() for p in files(directory / "step-000000002")}
    with caplog.at_level(logging.WARNING, "formix"):
        model, _ = run(directory)
    assert len(caplog.messages) == 1
    assert path.name in caplog.text
    assert "is set aside as aside-step-000000004" in caplog.text
    assert {p: p.read_bytes() for p in files(directory / "step-000000002")} == before
    undisturbed = load_file(original / "step-000000004" / "model" / "model.safetensors")
    assert all(undisturbed[key].equal(tensor) for key, tensor in model.state_dict().items())


def test_without_an_intact_one_it_is_refused_and_nothing_is_begun_anew(run, original, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(original, directory)
    for checkpoint in directory.iterdir():
        (checkpoint / "state.json").unlink()
    with pytest.raises(ValueError, match=r"None of the 2 checkpoints in .* is intact"):
        run(directory)


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint with nothing in it but a metric."""

    def write_one(checkpoints: Checkpoints, step: int, validation: float | None) -> None:
        state = {"validation": validation, "higher_is_better": True}
        checkpoints.write(step, state, {}, {"model.w": torch.zeros(1)}, lambda directory: directory.mkdir())

    return write_one


def test_a_damaged_one_does_not_count_among_the_newest(write, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1137, 1200):
        write(checkpoints, step, None)
        shutil.copytree(tmp_path / f"step-{step:09d}", tmp_path / f"copy-{step}")
    (tmp_path / "copy-1137").rename(tmp_path / "step-000001137")
    (tmp_path / "step-000001200" / "state.json").write_text('{"validation"')
    assert checkpoints.open() == tmp_path / "step-000001137"
    write(checkpoints, 1150, None)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-000001150"]
    assert checkpoints.open() == tmp_path / "step-000001150"
    (tmp_path / "copy-1200").rename(tmp_path / "step-000001300")  # and another damaged one
    (tmp_path / "step-000001300" / "state.json").unlink()
    assert checkpoints.open() == tmp_path / "step-000001150"
    assert [path.name for path in sorted(tmp_path.glob("aside-*"))] == ["aside-step-000001300"]


def test_the_best_is_one_whose_metric_is_a_number(write, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, validation in enumerate((0.2, 0.7, float("nan"), None, 0.3), start=1):
        write(checkpoints, step, validation)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000002", "step-000000005"]
    (tmp_path / "step-000000002" / "state.json").write_text("{")  # while the run is under way
    write(checkpoints, 6, 0.1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000005", "step-000000006"]


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


@pytest.mark.parametrize("name", ["training/.metadata", "training/bomb.safetensors", "random/0.json"])
def test_a_pickle_in_a_checkpoint_is_never_executed(run, original, tmp_path, monkeypatch, name):
    """Even where the manifest was made to fit."""
    from formix.training import checkpoint as module

    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "checkpoints"
    shutil.copytree(original, directory)
    shutil.rmtree(directory / "step-000000002")
    newest = directory / "step-000000004"
    (newest / name).write_bytes(pickle.dumps(Bomb()))
    manifest = {
        path.relative_to(newest).as_posix(): {"bytes": path.stat().st_size, "sha256": module._sha256(path)}
        for path in files(newest)
        if path.name != "manifest.json"
    }
    module._write_json(newest / "manifest.json", {"files": manifest})
    assert damage(newest) is None
    if name == "training/.metadata":  # nobody reads it
        run(directory)
    else:
        with pytest.raises(ValueError, match="holds no state of such a run"):
            run(directory)
    assert not (tmp_path / "exploded").exists()


def test_weights_of_another_shape_are_refused(run, original, tmp_path):
    from formix.training import checkpoint as module

    directory = tmp_path / "checkpoints"
    shutil.copytree(original, directory)
    newest = directory / "step-000000004"
    shard = next((newest / "training").iterdir())
    tensors = load_file(shard)
    save_file({**tensors, "model.head.weight": torch.zeros(3, 16)}, shard)
    manifest = {
        path.relative_to(newest).as_posix(): {"bytes": path.stat().st_size, "sha256": module._sha256(path)}
        for path in files(newest)
        if path.name != "manifest.json"
    }
    module._write_json(newest / "manifest.json", {"files": manifest})
    with pytest.raises(ValueError, match=r"holds no state of such a run|does not fit this model"):
        run(directory)


def test_a_full_disk_ends_the_run_in_one_sentence_and_keeps_the_last_checkpoint(run, tmp_path, monkeypatch):
    import errno

    from formix.training import checkpoint as module

    directory = tmp_path / "checkpoints"
    real, calls = module._write_json, []

    def full(path, content):
        calls.append(path)
        if len(calls) > 4:  # those of the first checkpoint fit
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, content)

    monkeypatch.setattr(module, "_write_json", full)
    with pytest.raises(ValueError, match=r"step 4 could not be written .* step-000000002 .*: No space left on device"):
        run(directory)
    assert [path.name for path in directory.iterdir()] == ["step-000000002"]
    monkeypatch.undo()
    assert damage(directory / "step-000000002") is None
    run(directory)
    assert (directory / "step-000000004").is_dir()


def test_a_directory_that_cannot_be_written_to_is_refused_at_the_start(run, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(ValueError, match="checkpoints cannot be used for checkpoints: File exists"):
        run(tmp_path / "checkpoints")

    def refuse(self, *arguments, **options):
        raise PermissionError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # as root every directory can be written to
    with pytest.raises(ValueError, match="Read-only file system"):
        run(tmp_path / "elsewhere")
