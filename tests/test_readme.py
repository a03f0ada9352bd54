"""Every command and every line of Python in the README runs, at a small setting."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from formix.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SMALL = ["--epochs=1", "--seeds=1", "--limit=64", "--latency=false", '--model_args={"depth": 2, "embed_dim": 16}']
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    formix ")]
TARGETS = {line.split()[1] for line in README.splitlines() if line.startswith("    make ")}


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 4
    assert {"demo", "test"} == TARGETS


@pytest.mark.parametrize("command", [c for c in COMMANDS if "studies/" not in c])
def test_commands(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)[1:]
    assert main(arguments + (SMALL if arguments[0] == "compare" else [])) == 0


def test_studies_named_in_the_readme_exist():
    for command in COMMANDS:
        for study in re.findall(r"studies/\S+", command):
            assert (ROOT / study).is_file()


def test_make_knows_the_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in (*TARGETS, "readme"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "my-model" / "config.json").is_file()


def test_the_tables_are_those_of_the_results_files():
    subprocess.run([sys.executable, str(ROOT / "docs" / "readme.py"), "--check"], check=True)
    assert len(re.findall(r"^\| `?\**softmax", README, re.MULTILINE)) >= 3


def test_every_linked_file_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link
