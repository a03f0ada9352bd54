"""Every recipe runs from the command line to a saved model, at a tiny scale."""

import json

import pytest
import yaml

import formix
from formix.cli import main
from formix.training.recipes import list_recipes, recipe_path

IMAGES = ["--data=digits", "--limit=64", "--img_size=32"]
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2}
TEXT = ["--data=text:{tmp}/a.txt", "--sequence_length=16", "--limit=4000"]
SMALL = {
    "deit": [*IMAGES, f"--model_args={json.dumps(VIT | {'patch_size': 8, 'drop_path_rate': 0.1})}"],
    "xcit": [*IMAGES, f"--model_args={json.dumps(VIT | {'drop_path_rate': 0.05})}"],
    "big-vision-i1k": [
        *IMAGES,
        f"--model_args={json.dumps(VIT | {'global_pool': 'token', 'rep_size': True, 'head_bias': -2.3})}",
    ],
    "activator-cifar": ["--data=digits", "--limit=64"],
    "bert-finetune": ["--data=glue:{tmp}/CoLA", "--model=bert-tiny", "--design=paf"],
    "roberta-mlm": [*TEXT, "--model=roberta-tiny", "--design=paf"],
    "gpt2": [*TEXT, "--model=gpt2-nano", '--model_args={"n_layer": 2}', "--design=skip(source=distance(1))"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("recipes")
    (tmp / "a.txt").write_text("The quick brown fox jumps over the lazy dog, again and again. " * 100)
    (tmp / "CoLA").mkdir()
    rows = [f"x\t{i % 2}\t\tsome words {'are' if i % 2 else 'is'} here {i}\n" for i in range(64)]
    (tmp / "CoLA" / "train.tsv").write_text("".join(rows))
    (tmp / "CoLA" / "dev.tsv").write_text("".join(rows[:8]))
    return tmp


def test_there_is_a_small_setting_for_every_recipe():
    assert set(SMALL) == set(list_recipes())


@pytest.mark.parametrize("recipe", sorted(SMALL))
def test_recipe_runs_to_a_model(recipe, files, tmp_path):
    flags = [flag.replace("{tmp}", str(files)) for flag in SMALL[recipe]]
    out = tmp_path / "out"
    command = ["train", recipe, *flags, "--batch_size=16", "--epochs=1", "--evaluations=1", f"--out={out}"]
    assert main(command) == 0
    written, config = yaml.safe_load(recipe_path(recipe).read_text()), json.loads((out / "config.json").read_text())
    for key in ("lr", "optimizer", "weight_decay", "schedule", "warmup", "clip", "augmentation", "loss", "ema"):
        if key in written:
            given = written[key]
            kept = {k: config[key][k] for k in given} if isinstance(given, dict) else config[key]
            assert kept == given, key
    assert formix.load(out / "model") is not None


@pytest.mark.parametrize("recipe", sorted(SMALL))
def test_every_key_of_a_recipe_is_explained(recipe):
    lines = recipe_path(recipe).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert [line for line in lines if line and "#" not in line] == []


def test_an_unknown_recipe_is_named():
    with pytest.raises(ValueError, match="'resnet' is no recipe; there are activator-cifar, "):
        recipe_path("resnet")
