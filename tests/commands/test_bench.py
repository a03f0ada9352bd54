import json
import re
import shlex
from pathlib import Path

import pytest

from formix.benchmarks.attention import AttentionCase
from formix.cli import main
from formix.commands.arguments import parse
from formix.commands.bench import BENCHES

SMALL = [
    "--tokens=16,24",
    "--batch=1",
    "--heads=1",
    "--head-size=8",
    "--repetitions=1",
    "--seconds=0.01",
    "--threads=1",
]


def test_attention_prints_a_table_writes_its_files_and_compares(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(AttentionCase, "ceiling_side", 64)
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["bench", "attention", *SMALL, "--dtypes=float32", "--baselines=softmax,naive,matmul"]
    first = tmp_path / "first"
    assert main([*arguments, f"--out={first}"]) == 0
    printed = capsys.readouterr().out
    assert "relu, naive" in printed
    assert "share of matmul" in printed
    document = json.loads((first / "results.json").read_text())
    assert [case["settings"]["tokens"] for case in document["cases"]] == [16, 24]
    assert document["command"].startswith("formix bench attention --tokens=16,24")
    assert {p.name for p in first.iterdir()} == {"results.json", "README.md", "chart.html"}
    assert main([*arguments, f"--compare={first / 'results.json'}"]) == 0
    assert "against the benchmark of" in capsys.readouterr().out


def test_nothing_is_measured_for_a_comparison_without_a_common_case(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(AttentionCase, "ceiling_side", 64)
    arguments = ["bench", "attention", "--batch=1", "--heads=2", "--head_size=16", "--repetitions=1", "--seconds=0.01"]
    assert main([*arguments, "--tokens=16", "--baselines=softmax", f"--out={tmp_path / 'first'}"]) == 0
    monkeypatch.setattr(AttentionCase, "calls", lambda case: pytest.fail("measured"))
    compared = f"--compare={tmp_path / 'first' / 'results.json'}"
    assert main([*arguments, "--tokens=17", compared, f"--out={tmp_path / 'second'}"]) == 2
    assert "no case in common" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


def test_blocks_and_models_run(capsys):
    common = ["--batch=1", "--repetitions=1", "--seconds=0.01", "--threads=1"]
    assert main(["bench", "block", "--tokens=9", "--dim=16", "--heads=2", "--profile=true", *common]) == 0
    assert "where the time goes" in capsys.readouterr().out
    sizes = '--model-args={"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}'
    assert main(["bench", "model", "--model=vit_tiny_patch16_224", sizes, "--training=true", *common]) == 0
    assert "training step" in capsys.readouterr().out


def test_help(capsys):
    assert main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("attention", "block", "model", "targets"))


def test_the_commands_of_the_documentation_are_understood():
    page = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text()
    commands = re.findall(r"^    formix bench (.*?)(?: +#.*)?$", page, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        what, *flags = shlex.split(command)
        parse(BENCHES[what], f"bench {what}", flags)


WRONG = {
    "nothing": ([], "usage: formix bench"),
    "another thing": (["gpu"], "'gpu' is none of them"),
    "tokens": (["attention", "--tokens=12,many"], "tokens has 'many'"),
    "tokens twice": (["attention", "--tokens=12,12"], "named twice"),
    "design": (["attention", "--designs=nope"], "'nope' is no design"),
    "softmax": (["attention", "--designs=softmax"], "no attention of formix's"),
    "dtype": (["attention", "--dtypes=int8"], "dtype is 'int8'"),
    "baseline": (["attention", "--baselines=magic"], "baselines has 'magic'"),
    "instruction set": (["attention", "--isas=mmx"], "isas has 'mmx'"),
    "threads": (["attention", "--threads=0"], "threads is 0"),
    "repetitions": (["attention", "--repetitions=0"], "repetitions is 0"),
    "seconds": (["attention", "--seconds=0"], "seconds is 0"),
    "earlier file": (["attention", "--compare={tmp}/none.json"], "none.json does not exist"),
    "earlier file of another kind": (["attention", "--compare={tmp}/other.json"], "schema is 'formix.results/1'"),
    "device": (["attention", "--device=tpu"], "device is 'tpu'; it must be cpu, cuda"),
    "a device that is not there": (["block", "--device=cuda:99"], "device is 'cuda:99', and PyTorch"),
    "precision": (["block", "--precisions=int8"], "precision is 'int8'"),
    "model": (["model", "--model=vit_nope"], "vit_nope"),
    "target": (["targets", "--targets=99"], "targets has 99"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence(case, tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"schema": "formix.results/1"}')
    arguments, named = WRONG[case]
    assert main(["bench", *(a.replace("{tmp}", str(tmp_path)) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.strip().splitlines()) == 1
