"""Every study in `studies/` runs, at a small setting."""

import os
from pathlib import Path

import pytest
import yaml

from formix.cli import main
from formix.comparison import read_results

ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))
SHARED = Path(os.environ.get("FORMIX_SHARED_DATA", ROOT.parent / "shared" / "data"))
# studies whose data are the user's: where these tests find them
PLACES = {
    "tiny-imagenet20": ("folder:", "tiny_imagenet20.tar"),
    "tinyshakespeare": ("text:", "tinyshakespeare.txt"),
    "sst2": ("glue:", "glue/SST-2"),
}
SMALL = {
    "image-classification": ["--limit=64", "--batch_size=32", '--model_args={"depth": 2, "embed_dim": 16}'],
    "text": ["--limit=20000", "--batch_size=32", "--sequence_length=32"],
}


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_study(study, tmp_path):
    settings = yaml.safe_load(study.read_text())
    flags = ["--seeds=1", "--epochs=1", "--latency=false", f"--out={tmp_path / 'out'}"]
    if study.stem in PLACES:
        prefix, place = PLACES[study.stem]
        if not (SHARED / place).exists():
            pytest.skip(f"needs {place}, which is not part of formix")
        flags.append(f"--data={prefix}{SHARED / place}")
    if settings["data"] == "fashion-mnist" and not list(Path("/usr/share/datasets").glob("fashion-mnist*")):
        pytest.skip("needs Debian's dataset-fashion-mnist")
    text = settings["data"].partition(":")[0] in ("stdlib", "text", "glue")
    if study.stem == "demo-text":
        flags += ["--validation_fraction=0.002", "--test_fraction=0.002"]
    assert main(["compare", str(study), *flags, *SMALL["text" if text else "image-classification"]]) == 0
    results = read_results(tmp_path / "out" / "results.json")
    assert [d.design for d in results.designs] == settings["designs"].split(",")
    able = [d.design for d in results.designs if d.refused is None]
    assert [r.design for r in results.runs if r.test is not None] == able
    assert len(able) >= 4
