"""The script that kills a run and compares its bits, at a small setting."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kill_and_resume.py"


@pytest.mark.slow
def test_a_run_that_is_killed_equals_one_that_is_left_alone():
    command = [sys.executable, str(SCRIPT), "--kills=3", "--epochs=6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills" in done.stdout
    assert "the killed run equals the undisturbed one" in done.stdout
