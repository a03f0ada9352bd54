"""Sources by name, directory or checkpoint: every weight that the source should have is there, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from sources import make

import formix
from formix.cli import main
from formix.conversion.load import load_source

SMALL = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}
NAME = "vit_tiny_patch16_224"


def timm_directory(path: Path) -> Path:
    model = timm.create_model(NAME, num_classes=7, **SMALL)
    timm.models.save_for_hf(model, path, model_args=SMALL)
    return path


def bert_directory(path: Path, **changed: object) -> Path:
    make("bert").float().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changed))
    return path


@pytest.mark.parametrize("content", ["[1, 2]", "3", "{}", "{"])
def test_a_config_that_is_none_is_refused(content: str, tmp_path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is (damaged|no model's config)"):
        load_source(tmp_path)


def test_a_file_is_no_source(tmp_path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file; give its directory"):
        load_source(tmp_path / "weights.pth")


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
def test_damaged_weights_are_refused_in_a_sentence(file: str, tmp_path) -> None:
    (tmp_path / file).write_bytes(b"junk" * 9)
    with pytest.raises(ValueError, match=rf"timm cannot load '{NAME}' \("):
        load_source(NAME, checkpoint=tmp_path / file)
    source = bert_directory(tmp_path / "bert")
    (source / "model.safetensors").write_bytes(b"junk" * 9)
    with pytest.raises(ValueError, match=r"transformers cannot load .* \(SafetensorError: "):
        load_source(source)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        formix.create_model(source, "relu")


def test_what_does_not_fit_a_timm_model_is_named(tmp_path) -> None:
    torch.save(timm.create_model(NAME, num_classes=9, **SMALL).state_dict(), tmp_path / "nine.pth")
    with pytest.raises(ValueError, match=r"size mismatch for head\.weight"):
        load_source(NAME, checkpoint=tmp_path / "nine.pth", num_classes=7, **SMALL)
    directory = timm_directory(tmp_path / "source")
    for classes in ({}, {"num_classes": 3}):  # other classes excuse no missing layer
        with pytest.raises(ValueError, match=r"blocks\.1\.norm1\.weight"):
            load_source(directory, depth=2, **classes)


def test_a_new_classifier_is_announced(tmp_path, caplog) -> None:
    directory = timm_directory(tmp_path)
    own = load_source(directory).state_dict()
    assert not caplog.text
    other = load_source(directory, num_classes=3)
    assert "the classifier is new" in caplog.text
    assert other.num_classes == len(other.head.weight) == 3
    assert all(torch.equal(own[k], v) for k, v in other.state_dict().items() if not k.startswith("head."))
    assert load_source(directory, num_classes=0).num_classes == 0


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "vit_base_patch16_18x2_224"])
def test_another_family_is_refused_before_its_weights_are_fetched(name: str) -> None:
    with pytest.raises(ValueError, match=r"no family that formix converts|has blocks of its own"):
        load_source(name)


def test_the_image_size_asked_for_is_the_models_though_it_reads_any(tmp_path) -> None:
    small = {**SMALL, "num_heads": 2}
    torch.save(timm.create_model("vit_small_patch16_dinov3", **small).state_dict(), tmp_path / "weights.pth")
    source = load_source("vit_small_patch16_dinov3", checkpoint=tmp_path / "weights.pth", **small)
    assert tuple(formix.convert(source, "relu").pretrained_cfg["input_size"]) == (3, 32, 32)


def test_layers_that_the_weights_lack_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no weights for 16 tensors of its layers \(bert\.encoder\.layer\.3\."):
        load_source(bert_directory(tmp_path, num_hidden_layers=4))


@pytest.mark.parametrize("name", ["bert-features", "hf-vit"])
def test_a_trunk_without_weights_of_a_pooler_has_none(name: str, tmp_path, caplog) -> None:
    source = make(name).float()
    source.save_pretrained(tmp_path / "source")
    trunk = load_source(tmp_path / "source", task="AutoModel")
    assert trunk.pooler is None
    assert "is read without one" in caplog.text
    formix.save(formix.convert(trunk, "relu"), tmp_path / "out")
    restored = formix.conversion.restore(tmp_path / "out").state_dict()
    theirs = source.base_model.state_dict()
    assert restored.keys() == theirs.keys()
    assert all(torch.equal(restored[k], v) for k, v in theirs.items())


@pytest.mark.parametrize(
    ("changed", "task", "words"),
    [
        ({"vocab_size": 70}, None, "transformers cannot load"),
        ({"model_type": "none"}, None, "is no directory, timm name or transformers id"),
        ({"architectures": ["BertOfMine"]}, None, "'BertOfMine' is no model of transformers"),
        ({}, "BertConfig", "'BertConfig' is no model of transformers"),
        ({}, "pipeline", "'pipeline' is no model of transformers"),
        ({}, "GPT2LMHeadModel", "not a class for the source, a model of the type 'bert'"),
    ],
)
def test_what_transformers_cannot_load_is_refused(changed, task, words, tmp_path) -> None:
    with pytest.raises(ValueError, match=words):
        load_source(bert_directory(tmp_path, **changed), task=task)


def test_a_head_that_is_new_is_the_same_each_time(tmp_path, capsys) -> None:
    """The same command goes on: a source's new head is decided by the seed."""
    command = ["convert", str(bert_directory(tmp_path / "source")), "--design=relu", f"--out={tmp_path / 'out'}"]
    for said in (False, True):
        assert main([*command, "--task=BertForSequenceClassification"]) == 0
        assert ("holds this conversion already" in capsys.readouterr().out) == said
