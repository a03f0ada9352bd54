"""Several processes compute what one does: gloo on the CPU, as copies (DDP) and in shards (FSDP2)."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training import distributed_run

from formix.cli import main

DESIGNS = ["softmax", "relu", "sima", "activator", "paf", "skip"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]


@functools.cache
def undisturbed(*designs: str) -> dict[str, Any]:
    """What one process computes from the first step to the last."""
    return distributed_run.main({"designs": list(designs)})


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Losses, metrics and every tensor of the moving average, which at the end is the model."""
    for design, expected in one.items():
        found = other[design]
        skipped = found["first"] - 1
        assert found["losses"] == pytest.approx(expected["losses"][skipped:], abs=1e-5), design
        assert found["curve"] == pytest.approx(expected["curve"], abs=1e-5), design
        assert found["test"] == pytest.approx(expected["test"], abs=1e-5), design
        assert found["samples"] == expected["samples"], design
        assert found["ema"].keys() == expected["ema"].keys()
        for name, tensor in expected["ema"].items():
            torch.testing.assert_close(
                torch.tensor(found["ema"][name]),
                torch.tensor(tensor),
                rtol=0,
                atol=1e-5,
                msg=lambda text, where=f"{design}, {name}": f"{where}: {text}",
            )


@pytest.mark.parametrize("designs", [["relu"], pytest.param(["sima", "skip"], marks=pytest.mark.slow)], ids="+".join)
def test_a_run_may_change_its_number_of_processes_and_between_ddp_and_fsdp(tmp_path, designs):
    """Two copies, stopped by a signal; two shards, stopped; one process to the end."""
    common = {"designs": designs, "checkpoints": str(tmp_path / "checkpoints")}
    out = tmp_path / "out.json"
    assert distributed_run.launch(2, out, {**common, "parallel": "ddp", "stop_at": 13}) == {}
    assert distributed_run.launch(2, out, {**common, "parallel": "fsdp", "stop_at": 31}) == {}
    ended = distributed_run.main(common)
    assert [run["first"] for run in ended.values()] == [33] * len(designs)
    assert_same(undisturbed(*designs), ended)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_every_design_has_the_losses_and_the_average_of_the_single_process_over_50_steps(tmp_path, parallel):
    single = undisturbed(*DESIGNS)
    assert len(single["softmax"]["losses"]) == 50
    assert_same(single, distributed_run.launch(2, tmp_path / "out", {"designs": DESIGNS, "parallel": parallel}))


@pytest.mark.slow
def test_a_run_begun_on_one_process_ends_on_two(tmp_path):
    designs = ["relu", "activator"]
    common = {"designs": designs, "checkpoints": str(tmp_path / "checkpoints")}
    assert distributed_run.main({**common, "stop_at": 20}) == {}
    ended = distributed_run.launch(2, tmp_path / "out", {**common, "parallel": "fsdp"})
    assert_same(undisturbed(*designs), ended)


def test_shards_are_trained_by_sgd_too(tmp_path):
    settings = {"designs": ["relu"], "config": {"optimizer": "sgd", "lr": 0.01}}
    ended = distributed_run.launch(2, tmp_path / "out", {**settings, "parallel": "fsdp"})
    assert_same(distributed_run.main(settings), ended)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_processes_measure_with_the_statistics_of_batch_norm_that_are_saved(tmp_path, parallel):
    model = ("xcit_nano_12_p16_224", {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 32})
    settings = {"designs": ["sima"], "model": model, "config": {"epochs": 1.0}, "data": {"img_size": 32}}
    ended = distributed_run.launch(2, tmp_path / "out", {**settings, "parallel": parallel})
    first, second = ended["sima"]["statistics"]
    assert first
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_the_usual_launchers_start_it(tmp_path, launcher):
    out = tmp_path / "out.json"
    command = [*launcher, distributed_run.__file__, str(out), json.dumps({"designs": ["paf"]})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(undisturbed("paf"), json.loads(Path(out).read_text()))


def test_a_process_that_is_killed_ends_the_run_with_a_message_and_it_goes_on(tmp_path):
    arguments = [
        "train", "--data=digits", "--limit=128", "--batch-size=32", "--epochs=40", "--precision=float32",
        '--model_args={"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4}', "--save-steps=2",
        f"--out={tmp_path / 'out'}", "--evaluations=1",
    ]  # fmt: skip
    first, second = distributed_run.launch_command(2, tmp_path / "said", arguments)
    while len(list((tmp_path / "out").glob("checkpoints/step-*"))) < 2 and first.is_alive():
        time.sleep(0.01)
    second.kill()
    first.join(60)
    assert first.exitcode == 2
    said = (tmp_path / "said" / "0").read_text()
    assert "Another process of this run ended" in said
    assert "start the same command again" in said
    before = max((tmp_path / "out").glob("checkpoints/step-*")).name
    assert before < "step-000000160"
    assert main(arguments) == 0
    assert (tmp_path / "out" / "result.json").is_file()
