"""The commands of docs/export.md and of the README, and the preprocessing of a training run."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from exported_models import model_of

import formix
from formix.cli import main
from formix.data import load_data

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "export.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in PAGE.splitlines() if line.startswith("    formix ")]
RUN = ['--model_args={"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4}', "--epochs=1", "--limit=64"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the page's directories are: a training run, and two text models, each with a tokenizer of its own."""
    root = tmp_path_factory.mktemp("place")
    run = root / "runs" / "digits"
    assert main(["train", "--data=digits", "--design=relu", *RUN, f"--out={run}"]) == 0
    for name in ("bert", "gpt2"):
        formix.save(model_of(name, "relu"), root / f"my-{name}")
        (root / f"my-{name}" / "tokenizer_config.json").write_text(json.dumps({"name_or_path": name}))
    return root


def test_the_page_has_commands():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(shlex.split(command)[1:]) == 0
    printed = capsys.readouterr().out
    assert "largest difference" in printed
    assert "tolerance" in printed


def test_the_python_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["export", "my-gpt2", "--out=served/gpt2/gpt2.onnx", "--cache"]) == 0
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/export.md", "exec"), {})


def test_a_run_says_how_its_images_were_prepared(place, tmp_path, capsys):
    """What a server computes from the sheet is what the run's data were."""
    assert main(["export", str(place / "runs" / "digits"), f"--out={tmp_path / 'digits.pt2'}"]) == 0
    capsys.readouterr()
    sheet = json.loads((tmp_path / "digits.pt2.json").read_text())
    assert sheet["labels"] == [str(i) for i in range(10)]
    assert sheet["image"]["input_size"] == [1, 8, 8]
    data = load_data("digits", limit=64)
    pixels = data.test.pixels[:4].float() / 255
    mean, std = (torch.tensor(sheet["image"][name])[:, None, None] for name in ("mean", "std"))
    prepared = data.test.__getitems__(range(4))["pixel_values"]
    torch.testing.assert_close((pixels - mean) / std, prepared, rtol=1e-5, atol=1e-5)
    (logits,) = torch.export.load(tmp_path / "digits.pt2").module()(prepared)
    expected = formix.load(place / "runs" / "digits" / "model")(prepared)
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-5, atol=1e-5)
