"""Every study in `studies/` runs, at a small setting."""

import json
import os
import runpy
from pathlib import Path

import pytest
import yaml

import formix
from formix.cli import main
from formix.comparison import read_results
from formix.data.glue import train_wordpiece

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
    "text": ["--limit=8000", "--batch_size=32", "--sequence_length=32"],
}


def small_copy(place: Path, folder: Path) -> Path:
    """The first lines of every file of text; an archive of pictures as it is."""
    if place.suffix == ".tar":
        return place
    for path in place.iterdir() if place.is_dir() else [place]:
        copy = folder / path.relative_to(place.parent)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text("".join(path.read_text().splitlines(keepends=True)[:5000]))
    return folder / place.name


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_study(study, tmp_path):
    settings = yaml.safe_load(study.read_text())
    flags = ["--seeds=1", "--epochs=1", "--lrs=1e-3", "--evaluations=1", "--latency=false", f"--out={tmp_path / 'out'}"]
    if study.stem in PLACES:
        prefix, place = PLACES[study.stem]
        if not (SHARED / place).exists():
            pytest.skip(f"needs {place}, which is not part of formix")
        flags.append(f"--data={prefix}{small_copy(SHARED / place, tmp_path)}")
    if settings["data"] == "fashion-mnist" and not list(Path("/usr/share/datasets").glob("fashion-mnist*")):
        pytest.skip("needs Debian's dataset-fashion-mnist")
    source = settings["data"].partition(":")[0]
    text = source in ("stdlib", "text", "glue")
    if source in ("stdlib", "text"):
        flags += ["--validation_fraction=0.002", "--test_fraction=0.002"]
    assert (
        main(
            [
                "compare",
                str(study),
                *flags,
                *SMALL["text" if text else "image-classification"],
                *(["--limit=400"] if source == "glue" else []),
            ]
        )
        == 0
    )
    results = read_results(tmp_path / "out" / "results.json")
    assert [d.design for d in results.designs] == settings["designs"].split(",")
    able = [d.design for d in results.designs if d.refused is None]
    assert [r.design for r in results.runs if r.test is not None] == able
    assert len(able) >= 4


def test_the_teacher_of_the_converted_decoders_is_trained(tmp_path, monkeypatch):
    folder, text, tokenizer, out = (ROOT / "studies/conversion", *(tmp_path / n for n in ("text", "tokenizer", "out")))
    words = (ROOT / "README.md").read_text() * 2
    text.mkdir()
    for split, part in (("train", words), ("valid", words[:5000]), ("test", words[-5000:])):
        (text / f"wiki.{split}.tokens").write_text(part)
    script = str(folder / "wikitext2_tokenizer.py")
    monkeypatch.setattr("sys.argv", [script, str(text / "wiki.train.tokens"), str(tokenizer)])
    runpy.run_path(script, run_name="__main__")
    flags = [f"--data=text:{text}", f"--tokenizer={tokenizer}", f"--out={out}", "--epochs=0.2", "--evaluations=1"]
    assert main(["train", str(folder / "gpt2-wikitext2.yaml"), *flags]) == 0
    assert json.loads((out / "result.json").read_text())["metric"] == "bits_per_byte"
    config = formix.load(out / "model").config
    assert (config.n_layer, config.n_embd, config.n_positions) == (6, 384, 128)
    assert config.vocab_size == 1 + max(
        json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"].values()
    )


TRAINING = sorted((ROOT / "studies" / "training").glob("*.yaml"))
MINILM = sorted((ROOT / "studies" / "paf-minilm").glob("*.yaml"))


def need(place: Path) -> Path:
    if not place.exists():
        pytest.skip(f"needs {place.name}, which is not part of formix")
    return place


@pytest.mark.parametrize("study", TRAINING, ids=lambda path: path.stem)
def test_training_study(study, tmp_path):
    flags = ["--epochs=1", "--limit=64", "--batch_size=32", "--evaluations=1", f"--out={tmp_path / 'out'}"]
    if study.stem == "deit-tiny-imagenet20":
        small = '{"patch_size": 16, "depth": 1, "embed_dim": 16, "num_heads": 2, "drop_path_rate": 0.05}'
        flags += [f"--data=folder:{need(SHARED / 'tiny_imagenet20.tar')}", f"--model_args={small}"]
    else:
        need(Path("/usr/share/datasets/fashion-mnist"))
        flags += ["--validation_fraction=0.01", '--model_args={"embed_dim": 16, "hidden_dim": 16, "depth": 1}']
    assert main(["train", str(study), *flags]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert 0 <= result["test"] <= 1


@pytest.mark.parametrize("study", MINILM, ids=lambda path: path.stem)
def test_study_of_paf_from_weights(study, tmp_path):
    task = yaml.safe_load(study.read_text())["data"].rpartition("/")[2]
    folder = tmp_path / task
    folder.mkdir()
    for name in ("train.tsv", "dev.tsv"):  # the files begin alike in every task: a header, if any, and rows
        lines = need(SHARED / "glue" / task / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:200]))
    weights = str(tmp_path / "bert")
    tokenizer = train_wordpiece([(folder / "train.tsv").read_text()])
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": len(tokenizer)}
    formix.save(formix.create_model("bert-tiny", "softmax", task="features", **sizes), weights)
    tokenizer.save_pretrained(weights)
    flags = ["--seeds=1", "--epochs=1", "--lrs=1e-3", "--limit=64", "--validation_fraction=0.2"]
    flags += [f"--data=glue:{folder}", f"--model={weights}", f"--tokenizer={weights}", f"--out={tmp_path / 'out'}"]
    assert main(["compare", str(study), *flags]) == 0
    results = read_results(tmp_path / "out" / "results.json")
    assert [r.design for r in results.runs if r.test is not None] == ["softmax", "paf"]
