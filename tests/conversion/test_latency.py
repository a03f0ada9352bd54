"""Converted models against their sources' own classes."""

import re

import pytest
import timm
import torch
import transformers as hf

import formix
from formix.benchmarks.measure import measure
from formix.cli import main
from formix.conversion.latency import ConvertedCase, converted_cases
from formix.conversion.record import Conversion
from formix.conversion.summary import write_record

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 60,
}  # fmt: skip


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("converted")
    vit = timm.create_model("vit_small_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    sources = {
        "bert": hf.BertModel(hf.BertConfig(**TEXT)),
        "vit": vit,
        "hf-vit": hf.ViTModel(hf.ViTConfig(**TEXT | {"image_size": 32})),
    }
    for name, source in sources.items():
        formix.save(formix.convert(source, "relu"), root / name)
    return root


@pytest.mark.parametrize("name", ["bert", "vit", "hf-vit"])
def test_contenders_are_the_source_s_class_and_the_converted_model(directories, name):
    (case,) = converted_cases(str(directories / name), tokens=(12,), img_sizes=(None,), batch=2, precision="bfloat16")
    models = case.models()
    assert type(models["softmax"]).__module__.split(".")[0] in ("timm", "transformers")
    assert type(models["converted"]).__module__.startswith("formix.")
    (measured,) = measure("converted", [case], repetitions=1, seconds=0.01)
    assert set(measured.timings) == {"softmax", "converted"}
    assert measured.ratio("converted", "softmax") > 0
    assert measured.timings["converted"].flops > 0
    assert measured.timings["softmax"].flops is None


def test_both_see_the_same_inputs_in_the_precision_asked_for(directories):
    case = ConvertedCase(directory=str(directories / "vit"), batch=3, precision="bfloat16")
    outputs = {name: call() for name, call in case.calls().items()}
    assert {out.dtype for out in outputs.values()} == {torch.bfloat16}
    assert {out.shape for out in outputs.values()} == {(3, 32)}
    calls = case.calls()
    assert calls["softmax"].args[1] is calls["converted"].args[1]


def test_the_verb(directories, tmp_path, capsys):
    flags = [f"--directories={directories / 'bert'},{directories / 'vit'}", "--tokens=8,16", "--repetitions=1"]
    assert main(["bench", "converted", *flags, "--seconds=0.01", f"--out={tmp_path}"]) == 0
    table = (tmp_path / "README.md").read_text()
    assert all(what in table for what in ("N=8", "N=16", "own pixels", "converted"))


def test_speeds_join_the_table_of_the_records_beside_them(directories, tmp_path):
    (tmp_path / "other.json").write_text("[1]")
    flags = [f"--directories={directories / 'bert'}", "--tokens=8", "--repetitions=1", "--seconds=0.01"]
    assert main(["bench", "converted", *flags, f"--out={tmp_path / 'speed'}"]) == 0
    assert not (tmp_path / "README.md").exists()  # no records: nothing to add to
    write_record(Conversion.read(directories / "bert"), tmp_path, "bert", "relu")
    page = (tmp_path / "README.md").read_text()
    assert "| study | design |" in page
    assert "bert forward bfloat16 B=1 N=8" in page


def test_what_was_not_converted_is_refused(tmp_path, capsys):
    formix.save(formix.create_model("gpt2-nano", vocab_size=60), tmp_path)
    assert main(["bench", "converted", f"--directories={tmp_path}"]) == 2
    assert "has no conversion.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="precision is 'int8'"):
        ConvertedCase(directory="x", precision="int8")


def test_inputs_that_a_model_does_not_read_are_refused_in_a_sentence(directories, tmp_path, capsys):
    dinov2 = timm.create_model("vit_small_patch14_dinov2", img_size=28, embed_dim=32, depth=1, num_heads=2)
    formix.save(formix.convert(dinov2, "relu"), tmp_path)
    for flags, words in (
        ([f"--directories={directories / 'bert'}", "--tokens=513"], "tokens is 513; .* has 512 positions"),
        ([f"--directories={tmp_path}", "--img-sizes=29"], "img_size is 29; .* has patches of 14 x 14"),
    ):
        assert main(["bench", "converted", *flags, "--seconds=0.01"]) == 2
        assert re.search(words, capsys.readouterr().err)
