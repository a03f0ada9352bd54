"""Decoders with their cache in and out: texts continued by the file alone are those that `generate` writes."""

import numpy as np
import pytest
import torch
from exported_models import model_of

import formix
from formix.export import Sheet, export_model
from formix.export.formats import FORMATS, find
from formix.models.kv_heads import prune_kv_heads
from formix.records import read

WINDOW = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
MIXED = 'relu(layers={"0": "activator"})'  # the first layer has no keys
NEW = 8


def generated(model, ids, mask):
    """[B, N + NEW] greedy, by transformers."""
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=1
        )


def continued(path, sheet, ids, mask):
    """The same by the file: the text in its first call, and then a token in each."""
    call = find(sheet.format).run(path, sheet.inputs, sheet.outputs)
    sizes = {"batch": len(ids), "past": 0}
    past = [torch.from_numpy(np.zeros([sizes.get(n, n) for n in port.shape], port.dtype)) for port in sheet.inputs[2:]]
    tokens = ids
    for _ in range(NEW):
        logits, *past = call(tokens, mask, *past)
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
    return ids


def texts():
    """Two, of which one is padded on the left."""
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids.where(mask.bool(), 1), mask


@pytest.mark.parametrize(
    ("format", "family", "design", "more"),
    [
        ("torch", "gpt2", MIXED, {}),
        ("torch", "llama", "relu", WINDOW),
        ("onnx", "gpt2", "relu+paf+skip", {}),
        pytest.param("onnx", "llama", "softmax", WINDOW, marks=pytest.mark.slow),
        pytest.param("openvino", "llama", "relu+skip", {}, marks=pytest.mark.slow),
    ],
)
def test_the_file_writes_what_generate_does(format, family, design, more, tmp_path):
    model = model_of(family, design, **more)
    with torch.no_grad():
        for parameter in model.parameters():  # that the greatest logit is one by far
            parameter.mul_(3)
    path = tmp_path / f"model{FORMATS[format]}"
    sheet = export_model(model, path, cache=True)
    assert sheet.check.relative <= 1e-4
    assert [case.sizes["past"] for case in sheet.check.cases] == [0, 4, 9, 6]
    ids, mask = texts()
    expected = generated(model, ids, mask)
    assert len(expected[:, 9:].unique()) > 3, "a model that repeats itself says little"
    assert torch.equal(continued(path, sheet, ids, mask), expected)


def test_a_pruned_model_keeps_fewer_heads(tmp_path):
    model = model_of("gpt2", "skip", n_layer=3)
    assert prune_kv_heads(model)
    sheet = export_model(model, tmp_path / "model.pt2", cache=True)
    shapes = {port.name: port.shape for port in sheet.inputs}
    heads = [shapes.get(f"past_key_values.{i}.key", (0, 0))[1] for i in range(3)]
    assert sum(heads) < 12
    ids, mask = texts()
    assert torch.equal(continued(tmp_path / "model.pt2", sheet, ids, mask), generated(model, ids, mask))


def test_ports_have_the_names_and_shapes_of_optimum(tmp_path):
    sheet = export_model(model_of("llama", "relu"), tmp_path / "model.pt2", cache=True)
    heads, size = 2, 8
    names = [f"{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert {port.name: port.shape for port in sheet.inputs} == {
        "input_ids": ("batch", "tokens"),
        "attention_mask": ("batch", "past + tokens"),
        **{f"past_key_values.{name}": ("batch", heads, "past", size) for name in names},
    }
    assert {port.name: port.shape for port in sheet.outputs} == {
        "logits": ("batch", "tokens", 60),
        **{f"present.{name}": ("batch", heads, "past + tokens", size) for name in names},
    }
    assert (sheet.axes["past"].least, sheet.axes["past"].most) == (0, None)
    assert sheet == read(Sheet, tmp_path / "model.pt2.json", "formix export")


def test_fixed_sizes_and_few_positions(tmp_path):
    model = model_of("gpt2", "relu", n_positions=16)
    sheet = export_model(model, tmp_path / "any.pt2", cache=True)
    assert sheet.axes["past"].most == 15
    assert all(case.sizes["past"] + case.sizes["tokens"] <= 16 for case in sheet.check.cases)
    assert "past and tokens together are at most 16" in sheet.notes
    sheet = export_model(model, tmp_path / "one.pt2", cache=True, batch=1, tokens=1)
    assert sheet.inputs[1].shape == (1, "past + 1")
    assert list(sheet.axes) == ["past"]
    with pytest.raises(ValueError, match="has 16 positions, which leaves none for a past"):
        export_model(model, tmp_path / "none.pt2", cache=True, tokens=16)


@pytest.mark.parametrize(("dtype", "kept"), [("float16", "float16"), ("bfloat16", "float32")])
def test_the_type_of_the_cache(dtype, kept, tmp_path):
    sheet = export_model(model_of("gpt2", "relu"), tmp_path / "model.pt2", cache=True, dtype=dtype)
    assert {port.dtype for port in (*sheet.inputs[2:], *sheet.outputs[1:])} == {kept}
    assert sheet.outputs[0].dtype == "float32"
    assert len(sheet.check.cases) == 4


@pytest.mark.parametrize(("family", "task"), [("bert", None), ("vit", None), ("gpt2", "sequence-classification")])
def test_what_does_not_write_is_refused(family, task, tmp_path, capsys):
    from formix.cli import main

    model = model_of(family, "relu", **({"task": task} if task else {}))
    formix.save(model, tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), f"--out={tmp_path / 'model.pt2'}", "--cache"]) == 2
    assert f"cache is for language models that write, and this is a {type(model).__name__}" in capsys.readouterr().err
