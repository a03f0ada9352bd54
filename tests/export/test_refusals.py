"""What cannot be exported is refused in a sentence, and a file that differs from its model is not written."""

import copy
import importlib.util

import pytest
import timm
import torch
from exported_models import model_of
from timm.models import save_for_hf
from transformers import BertConfig, BertModel

import formix
from formix.cli import main
from formix.export import export_model, verify
from formix.export.program import ImageProgram, TextProgram

TINY = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 60}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of an image model, an encoder and a decoder that classifies without a padding token."""
    root = tmp_path_factory.mktemp("saved")
    formix.save(model_of("vit", "relu"), root / "vit")
    formix.save(model_of("bert", "relu"), root / "bert")
    formix.save(model_of("gpt2", "relu", task="sequence-classification", pad_token_id=None), root / "gpt2")
    formix.save(model_of("cvt", "relu"), root / "cvt")
    formix.save(model_of("vit", "relu", dynamic_img_size=True), root / "any-size")
    mixed = model_of("vit", "relu")
    mixed.head.bfloat16()
    formix.save(mixed, root / "mixed")
    for kind in ("dynamic", "longrope"):
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
        formix.save(model_of("llama", "relu", rope_parameters={**rope, **factors}), root / kind)
    save_for_hf(timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=3), root / "timm")
    BertModel(BertConfig(**TINY)).save_pretrained(root / "stock")
    return root


@pytest.mark.parametrize(
    ("name", "flags", "sentence"),
    [
        ("vit", ["--out=out"], "out is out, whose name is of no format; give a file (.pt2, .onnx, .xml)"),
        ("vit", ["--out=out.tflite"], "out is out.tflite, whose name is of no format"),
        ("vit", ["--out=out", "--format=tflite"], "it must be one of 'torch', 'onnx', 'openvino'"),
        ("vit", ["--out=out.onnx", "--format=torch"], "a file of onnx, and format is 'torch'"),
        ("vit", ["--out=out.bin", "--format=onnx"], "a file whose name ends in .onnx"),
        ("vit", ["--out=out.onnx", "--opset=12"], "opset is 12; it must be 18 to 25"),
        ("vit", ["--out=out.pt2", "--opset=20"], "opset is 20, and torch has none"),
        ("vit", ["--out=out.pt2", "--batch=0"], "batch is 0; it must be a whole number, 1 or more"),
        ("vit", ["--out=out.pt2", "--tokens=8"], "takes images; leave it out"),
        ("vit", ["--out=out.pt2", "--img-size=64"], "takes 32 x 32 alone"),
        ("vit", ["--out=out.pt2", "--tolerance=-1"], "tolerance is -1.0; it must be 0 or more"),
        ("vit", ["--out=out.pt2", "--dtype=int8"], "it must be one of 'float32', 'bfloat16', 'float16'"),
        ("vit", ["--out=out.onnx", "--dtype=bfloat16"], "ONNX Runtime has no bfloat16 on the CPU"),
        ("vit", ["--out=out.onnx", "--kernels"], "which onnx does not have"),
        ("bert", ["--out=out.pt2", "--tokens=65"], "has 64 positions"),
        ("bert", ["--out=out.pt2", "--img-size=64"], "reads text; leave it out"),
        ("gpt2", ["--out=out.pt2"], "its config names no pad_token_id"),
        ("cvt", ["--out=out.pt2"], "takes images of any size; give --img-size"),
        ("any-size", ["--out=out.pt2", "--img-size=40"], "Input height (40) should be divisible by patch size (16)"),
        ("mixed", ["--out=out.pt2"], "The weights are bfloat16 and float32; save the model in one type"),
        ("dynamic", ["--out=out.pt2"], "(rope_type 'dynamic') depend on the longest text"),
        ("longrope", ["--out=out.pt2"], "(rope_type 'longrope') depend on the longest text"),
        ("timm", ["--out=out.pt2"], "load it with timm, or make a directory of formix's: formix convert "),
        ("stock", ["--out=out.pt2"], "stock --design=softmax --out=DIR"),
        ("nowhere", ["--out=out.pt2"], "it has no config.json"),
    ],
)
def test_wrong_input(name, flags, sentence, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(saved / name), *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("formix: ")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxscript"), ("openvino", "openvino")])
def test_a_missing_package_is_named(format, package, saved, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(ValueError, match=rf"needs {package}; pip install formix\[{format}\]"):
        export_model(saved / "vit", tmp_path, format=format)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"img_size": (32, 32)}, r"img_size is \(32, 32\); it must be a whole number"),
        ({"tolerance": "little"}, "tolerance is 'little'; it must be 0 or more"),
    ],
)
def test_wrong_types(wrong, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        export_model(model_of("vit", "relu"), tmp_path / "model.pt2", **wrong)


def test_a_model_of_others_is_refused(tmp_path):
    with pytest.raises(ValueError, match="source is a Linear"):
        export_model(torch.nn.Linear(2, 2), tmp_path / "model.pt2")


def test_above_the_tolerance_nothing_is_written(saved, tmp_path, capsys):
    assert main(["export", str(saved / "vit"), f"--out={tmp_path / 'out.onnx'}", "--tolerance=0"]) == 2
    told = capsys.readouterr().err
    assert "onnxruntime" in told
    assert "the tolerance is 0" in told
    assert list(tmp_path.iterdir()) == []


def wrong(kind):
    """A file that computes something else than the program."""

    def call(*inputs):
        (out,) = program(*inputs)
        if kind == "length" and inputs[0].shape[1] not in (1, 7):  # a length baked in
            return (out * (inputs[0].shape[1] / 7),)
        if kind == "padding":
            return program(inputs[0], torch.ones_like(inputs[1]), *inputs[2:])
        if kind == "batch":
            return (out[:1],)
        return (out * float("nan"),) if kind == "nan" else (out,)

    program = TextProgram(model_of("bert", "relu"), "masked-lm").eval()
    return program, call


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("length", "differs from the model by"),
        ("padding", "padding on the"),
        ("batch", "an output of shape"),
        ("nan", "differs from the model by nan"),
    ],
)
def test_the_check_finds(kind, sentence):
    program, call = wrong(kind)
    with pytest.raises(ValueError, match=sentence):
        verify.check(program, program, call, runtime="a runtime", tolerance=1e-4)


def test_the_check_passes_what_is_equal_and_measures_the_rest():
    program, call = wrong("nothing")
    found = verify.check(program, program, call, runtime="a runtime", tolerance=0.0)
    assert (found.difference, found.relative) == (0.0, 0.0)
    assert [(c.sizes["batch"], c.sizes["tokens"], c.padding) for c in found.cases] == [
        (1, 5, "none"), (3, 33, "right"), (3, 12, "left"), (1, 1, "none"),
    ]  # fmt: skip
    off = verify.check(program, program, lambda *x: (call(*x)[0] + 0.25,), runtime="a runtime", tolerance=1.0)
    assert off.difference == pytest.approx(0.25, abs=1e-5)
    assert off.relative == pytest.approx(0.25 / off.largest, abs=1e-5)


def test_a_model_that_gives_no_numbers_is_refused():
    model = model_of("vit", "relu")
    torch.nn.init.constant_(model.head.bias, float("inf"))
    program = ImageProgram(model, (3, 32, 32)).eval()
    with pytest.raises(ValueError, match="not finite"):
        verify.check(program, program, program, runtime="a runtime", tolerance=1e-4)
    torch.nn.init.constant_(model.head.bias, 1e6)
    half = ImageProgram(copy.deepcopy(model).half(), (3, 32, 32)).eval()
    with pytest.raises(ValueError, match="In float16 the model gives numbers that are not finite"):
        verify.check(half, program, half, runtime="a runtime", tolerance=1e-4)


def test_outputs_that_are_all_0_are_said(tmp_path, caplog):
    model = model_of("vit", "relu")
    torch.nn.init.zeros_(model.head.weight)
    sheet = export_model(model, tmp_path / "model.pt2")
    assert "every output is 0" in sheet.notes[-1]
    assert "every output is 0" in caplog.text
