import importlib.util
import json
import math
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_overhead.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("task", "other"), [("images", "timm"), ("text", "Trainer")])
def test_every_contestant_is_timed_in_every_round(script, task, other, tmp_path, capsys):
    script.main([task, "--small", "--rounds=2", "--steps=6", "--warmup=2", f"--json={tmp_path / 'speed.json'}"])
    result = json.loads((tmp_path / "speed.json").read_text())
    assert set(result["speed"]) == {"bare", "formix", other}
    assert all(len(values) == 2 for values in result["all speeds"].values())
    assert all(math.isfinite(v) and v > 0 for values in result["all speeds"].values() for v in values)
    assert result["to bare"]["bare"] == 1
    assert "formix" in capsys.readouterr().out
