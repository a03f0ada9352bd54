"""Every design and family in every format: the file on other inputs than those traced with, against the saved model."""

import json
import subprocess
import sys
import zipfile

import onnx
import pytest
import torch
from exported_models import IMAGES, TEXT, model_of, possible

import formix
from formix.export import Sheet, export_model
from formix.export.formats import FORMATS, find
from formix.ops.registry import native_module
from formix.records import read

DECODERS = ("gpt2", "llama")
PAIRS = [(family, design) for family in ("vit", "bert", "gpt2") for design in possible(family)]
OTHERS = [
    (family, "relu") for family in ("llama", "roberta", "distilbert", "deit", "dinov2", "rope", "relpos", "xcit", "cvt")
]
OTHERS += [(family, None) for family in ("sima", "relu_vit", "activator", "ninformer")]
COMBINED = [("bert", "relu+paf+skip"), ("llama", "relu+skip"), ("llama", "softmax"), ("xcit", "sima"), ("cvt", "sima")]
ALL = [*PAIRS, *OTHERS, *COMBINED]
# of every operator and kind of mask one is fast; slow are the other designs, and the other families in other runtimes
TORCH = [
    *[pair for pair in PAIRS if pair[0] == "vit"],
    ("dinov2", "relu"),
    ("bert", "relu"),
    ("gpt2", "softmax"),
    ("gpt2", "skip"),
]
ONNX = [("bert", "sima"), ("llama", "softmax"), ("activator", None)]
OPENVINO = [("llama", "relu+skip")]
ALIKE = [("roberta", "relu"), ("distilbert", "relu"), ("llama", "relu"), ("xcit", "relu")]  # other cases' operators
UNLIKE = [pair for pair in (*OTHERS, *COMBINED) if pair not in (*ALIKE, ("cvt", "sima"))]
SLOW = {"torch": [*PAIRS, *ALIKE], "onnx": [("gpt2", "relu"), *UNLIKE], "openvino": COMBINED}
assert {family for family, _ in ALL} == {*TEXT, *IMAGES}, "a new family has to be exported"


def cases(format, fast):
    rest = [pair for pair in SLOW[format] if pair not in fast]
    slow = [pytest.param(format, *pair, marks=pytest.mark.slow, id=name(format, *pair)) for pair in rest]
    return [pytest.param(format, *pair, id=name(format, *pair)) for pair in fast] + slow


def name(format, family, design):
    return f"{format}-{family}-{design}"


def options(family):
    return {"img_size": {"cvt": 32, "dinov2": 42}[family]} if family in ("cvt", "dinov2") else {}


def inputs_of(sheet, model, batch, tokens, padding):
    """The file's inputs by name, and what the model takes for them."""
    generator = torch.Generator().manual_seed(batch + tokens)
    if "pixel_values" in [port.name for port in sheet.inputs]:
        pixels = torch.randn(batch, *sheet.inputs[0].shape[1:], generator=generator)
        return {"pixel_values": pixels}, None
    ids = torch.randint(5, 60, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(1, batch) if padding != "none" else []:
        mask[i, tokens - 2 * i :] = 0
    mask = mask.flip(1) if padding == "left" else mask
    ids = ids.where(mask.bool(), 1)
    given = {"input_ids": ids, "attention_mask": mask}
    if len(sheet.inputs) == 3:
        given["token_type_ids"] = torch.randint(2, ids.shape, generator=generator)
    return given, mask.bool()


@torch.no_grad()
def expected_of(model, given):
    if "pixel_values" in given:
        out = model(given["pixel_values"])
        return out if isinstance(out, torch.Tensor) else out.logits
    extra = {}
    if model.config.model_type in ("formix_gpt2", "formix_llama"):
        extra = {"position_ids": (given["attention_mask"].cumsum(-1) - 1).clamp(min=0), "use_cache": False}
    return model(**given, **extra).logits


def compare(directory, format, model):
    """The file's own runtime on three batches, and for text lengths and masks, all of the tokens compared."""
    path = directory / f"model{FORMATS[format]}"
    sheet = read(Sheet, path.with_name(path.name + ".json"), "formix export")
    call = find(format).run(path, sheet.inputs, sheet.outputs)
    for batch, tokens, padding in ((1, 11, "none"), (3, 19, "right"), (3, 24, "left"), (1, 1, "none")):
        given, real = inputs_of(sheet, model, batch, tokens, padding)
        out, expected = call(*given.values())[0], expected_of(model, given)
        assert out.shape == expected.shape
        if real is not None:
            out, expected = out[real], expected[real]
        assert expected.abs().max() > 1e-5, "a model whose outputs are all 0 says nothing"
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    return sheet


@pytest.mark.parametrize(
    ("format", "family", "design"),
    [*cases("torch", TORCH), *cases("onnx", ONNX), *cases("openvino", OPENVINO)],
)
def test_the_file_computes_what_the_model_does(format, family, design, tmp_path):
    model = model_of(family, design)
    formix.save(model, tmp_path / "saved")
    sheet = export_model(tmp_path / "saved", tmp_path / "out", format=format, **options(family))
    assert compare(tmp_path / "out", format, model).check == sheet.check
    assert 0 <= sheet.check.relative <= 1e-4
    assert len(sheet.check.cases) == (4 if family in TEXT else 2)
    stored = formix.load(tmp_path / "saved")
    design_of = stored.config.design if hasattr(stored, "config") else stored.design and stored.design.to_dict()
    assert sheet.design == json.loads(json.dumps(design_of))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_task(family, tmp_path):
    from formix.models.text import FAMILIES

    for task in FAMILIES[family][1]:
        sheet = export_model(model_of(family, "relu", task=task), tmp_path / task, format="torch")
        assert sheet.task == task
        assert sheet.check.relative <= 1e-4


def test_outputs_have_names_and_shapes(tmp_path):
    model = model_of("bert", "paf", task="question-answering")
    sheet = export_model(model, tmp_path / "qa.pt2")
    assert [(p.name, p.dtype, p.shape) for p in sheet.outputs] == [
        ("start_logits", "float32", ("batch", "tokens")),
        ("end_logits", "float32", ("batch", "tokens")),
    ]
    assert sheet.axes["tokens"].most == 64
    choices = export_model(model_of("bert", "relu", task="multiple-choice"), tmp_path / "choice.pt2")
    assert choices.inputs[0].shape == ("batch", "choices", "tokens")
    assert choices.outputs[0].shape == ("batch", "choices")


def test_a_mask_that_nothing_reads_is_said(tmp_path):
    sheet = export_model(model_of("bert", "activator"), tmp_path / "model.pt2")
    assert "attention_mask changes nothing in this model" in sheet.notes
    assert [port.name for port in sheet.inputs] == ["input_ids", "attention_mask", "token_type_ids"]


@pytest.mark.slow
def test_a_mask_that_nothing_reads_is_an_input_all_the_same(tmp_path):
    for format in ("onnx", "openvino"):
        export_model(model_of("bert", "activator"), tmp_path, format=format)


def test_sliding_windows(tmp_path):
    kinds = ["full_attention", "sliding_attention"]
    model = model_of("llama", "relu", sliding_window=4, layer_types=kinds)
    assert export_model(model, tmp_path / "model.pt2").check.relative <= 1e-4


def test_large_heads_of_decoders(tmp_path):
    model = model_of("llama", "softmax", head_dim=128)
    assert export_model(model, tmp_path / "model.xml").check.relative <= 1e-4


def test_the_attention_of_newer_opsets(tmp_path):
    """From opset 23 on softmax attention is one operator, which ONNX Runtime gives padding in rows for every query."""
    sheet = export_model(model_of("bert", "softmax"), tmp_path / "bert.onnx", opset=23)
    assert sheet.opset == 23
    assert "Attention" in {node.op_type for node in onnx.load(tmp_path / "bert.onnx").graph.node}


def test_fixed_sizes(tmp_path):
    sheet = export_model(model_of("bert", "relu"), tmp_path / "model.pt2", batch=2, tokens=16)
    assert sheet.axes == {}
    assert sheet.inputs[0].shape == (2, 16)
    assert sheet.outputs[0].shape == (2, 16, 60)


@pytest.mark.parametrize("size", [None, 40])
def test_a_model_for_any_size_of_image(size, tmp_path):
    more = {"img_size": (32, 48), "dynamic_img_size": True, "dynamic_img_pad": True}
    model = model_of("vit", "relu", **more)
    formix.save(model, tmp_path / "saved")
    sheet = export_model(tmp_path / "saved", tmp_path / "out", format="openvino", img_size=size)
    assert sheet.inputs[0].shape[2:] == ((32, 48) if size is None else (40, 40))
    compare(tmp_path / "out", "openvino", model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types(dtype, tmp_path):
    model = model_of("vit", "relu")
    sheet = export_model(model, tmp_path / "model.pt2", dtype=dtype)
    program = torch.export.load(tmp_path / "model.pt2")
    assert {str(p.dtype) for p in program.state_dict.values()} == {f"torch.{dtype}"}
    assert next(model.parameters()).dtype == torch.float32, "the model itself is left alone"
    assert (sheet.inputs[0].dtype, sheet.outputs[0].dtype) == ("float32", "float32")
    assert 0 < sheet.check.to_source < 0.1 * sheet.check.largest


@pytest.mark.slow
def test_portable_files_need_no_formix(tmp_path):
    export_model(model_of("bert", "relu+skip"), tmp_path / "model.pt2")
    code = (
        "import sys, torch\n"
        "sys.modules['formix'] = None\n"
        "ids = torch.ones(1, 9, dtype=torch.long)\n"
        "print(*torch.export.load(sys.argv[1]).module()(ids, ids, 0 * ids)[0].shape)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt2"], capture_output=True, text=True)
    assert run.stdout.split() == ["1", "9", "60"], run.stderr


@pytest.mark.skipif(native_module() is None or not native_module().available()[0], reason="no CPU kernels here")
@pytest.mark.parametrize(("cache", "needed"), [(False, "2.8"), (True, "2.10")])
def test_older_versions_of_pytorch_are_refused(tmp_path, monkeypatch, cache, needed):
    monkeypatch.setattr(
        "formix.export.core.is_torch_version", lambda operation, version: (operation, version) == ("<", needed)
    )
    with pytest.raises(ValueError, match=rf"needs PyTorch {needed} or later, and this is"):
        export_model("nowhere", tmp_path / "model.pt2", cache=cache)


def test_kernels_stay_if_asked_for(tmp_path):
    export_model(model_of("bert", "relu"), tmp_path / "plain.pt2")
    sheet = export_model(model_of("bert", "relu"), tmp_path / "own.pt2", kernels=True)
    calls = [
        {str(node.target) for node in torch.export.load(tmp_path / f).graph.nodes} for f in ("plain.pt2", "own.pt2")
    ]
    assert [any("formix.pointwise_attention" in call for call in found) for found in calls] == [False, True]
    assert sheet.kernels
    assert any("import formix" in note for note in sheet.notes)
    code = "import sys, torch, formix; torch.export.load(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "own.pt2"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_no_path_of_this_machine_and_no_older_weights_are_left(tmp_path):
    (tmp_path / "model.onnx.data").write_text("the weights of a larger model, exported before")
    for format in ("torch", "onnx"):  # OpenVINO's IR is made of torch's program
        export_model(model_of("activator"), tmp_path, format=format)
    assert not (tmp_path / "model.onnx.data").exists()
    root = str(formix.__path__[0]).encode()
    for path in tmp_path.iterdir():
        parts = [path.read_bytes()]
        if path.suffix == ".pt2":
            with zipfile.ZipFile(path) as archive:
                parts = [archive.read(part) for part in archive.namelist()]
        for part in parts:
            assert root not in part
            assert b"site-packages" not in part, path
