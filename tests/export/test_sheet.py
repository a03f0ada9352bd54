"""What lies beside an exported model: inputs, preprocessing, labels, tokenizer; and in the file itself."""

import dataclasses
import json

import onnx
import pytest
import torch
from exported_models import model_of
from transformers import BertTokenizerFast

import formix
from formix.export import Sheet, export_model
from formix.export.core import _notes, _text
from formix.export.program import TextProgram
from formix.export.sheet import Check
from formix.export.source import read_source
from formix.records import read


@pytest.fixture(scope="module")
def image_export(tmp_path_factory):
    """A ViT with a data config of its own and class names, as an ONNX file."""
    model = model_of("vit", "relu+skip")
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "crop_pct": 0.875}
    model.pretrained_cfg = {**model.pretrained_cfg, **own, "label_names": list("abcde")}
    root = tmp_path_factory.mktemp("image")
    formix.save(model, root / "saved")
    return root / "out.onnx", export_model(root / "saved", root / "out.onnx")


def test_how_images_are_prepared_and_what_the_classes_are_called(image_export):
    _, sheet = image_export
    assert sheet.image == {
        "input_size": (3, 32, 32), "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
        "crop_pct": 0.875, "crop_mode": "center",
    }  # fmt: skip
    assert sheet.labels == tuple("abcde")
    assert sheet.design == formix.design("relu+skip").to_dict()
    assert sheet.formula == formix.design("relu+skip").describe()


def test_the_json_file_reads_back(image_export):
    path, sheet = image_export
    stored = read(Sheet, path.with_name("out.onnx.json"), "formix export")
    assert json.dumps(dataclasses.asdict(stored)) == json.dumps(dataclasses.asdict(sheet))
    assert stored.files == {"out.onnx": path.stat().st_size}
    assert isinstance(stored.check, Check)
    assert stored.versions["torch"] == torch.__version__.partition("+")[0]


def test_onnx_has_plain_operators_named_sizes_and_the_description(image_export):
    path, sheet = image_export
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    shape = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 3, 32, 32]
    properties = {p.key: p.value for p in model.metadata_props}
    assert json.loads(properties["formix.design"]) == sheet.design
    assert json.loads(properties["formix.image"])["mean"] == [0.1, 0.2, 0.3]
    assert json.loads(properties["formix.labels"]) == list("abcde")
    assert properties["formix.version"] == formix.__version__


def test_text_has_its_tokenizer_beside_it(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(55))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    saved = tmp_path / "saved"
    names = {0: "bad", 1: "good"}
    formix.save(model_of("bert", "relu", task="sequence-classification", num_labels=2, id2label=names), saved)
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(saved)
    sheet = export_model(saved, tmp_path / "out", format="torch")
    assert set(sheet.text["tokenizer_files"]) >= {"tokenizer.json", "tokenizer_config.json"}
    for name in sheet.text["tokenizer_files"]:
        assert (tmp_path / "out" / name).read_bytes() == (saved / name).read_bytes()
    assert sheet.labels == ("bad", "good")
    assert (sheet.text["vocab_size"], sheet.text["pad_token_id"]) == (60, 1)
    assert sheet.text["problem_type"] == "single_label_classification"

    export_model(saved, tmp_path / "out", format="torch")  # the same files are not in the way
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is in the way"):
        export_model(saved, tmp_path / "out", format="torch")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [({"num_labels": 1}, "regression"), ({"problem_type": "multi_label_classification"}, "multi_label_classification")],
)
def test_what_the_numbers_of_a_classifier_are(fields, problem):
    found = read_source(model_of("bert", "relu", task="sequence-classification", **fields))
    assert _text(found, TextProgram(found.model, found.task))["problem_type"] == problem


def test_labels_are_of_classes():
    """A trunk's or language model's config keeps the names of a classifier that it came from."""
    names = {0: "bad", 1: "good"}
    assert read_source(model_of("bert", "relu", task="token-classification", id2label=names)).labels == ("bad", "good")
    trunk = read_source(model_of("bert", "relu", task="features", id2label=names))
    assert trunk.labels is None
    notes = _notes(trunk, TextProgram(trunk.model, trunk.task), "torch", [], False)
    assert any("mean of last_hidden_state" in note for note in notes)
    assert read_source(model_of("bert", "relu", task="masked-lm", id2label=names)).labels is None


def test_statistics_are_of_the_channels():
    image = read_source(model_of("vit", "relu", in_chans=1)).image
    assert (image["input_size"], image["mean"], image["std"]) == ((1, 32, 32), (0.5,), (0.5,))


def test_properties_of_the_other_formats(tmp_path):
    import openvino

    model = model_of("activator")
    export_model(model, tmp_path / "model.xml")
    written = openvino.Core().read_model(tmp_path / "model.xml")
    assert json.loads(written.get_rt_info(["formix", "design"]).astype(str)) == model.design.to_dict()
    assert [written.input().any_name, written.output().any_name] == ["pixel_values", "logits"]
    export_model(model, tmp_path / "model.pt2")
    extra = {"formix.design": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["formix.design"]) == model.design.to_dict()
