"""Every family, there and back: softmax is the source, and nothing that a design leaves out is lost."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import timm
import torch
import transformers as hf
from sources import DISTIL, GPT2, GROUPED, IMAGE, SOURCES, TEXT, UNCOUNTED, inputs, make, run
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.utils import prune

import formix
from formix.conversion import plan, restore, transformers_source
from formix.conversion.carry import as_teacher
from formix.models.llama import RMSNorm
from formix.models.text import FAMILIES

DESIGNS = ("sima", "activator", "parallel", "relu+paf+skip", "relu(gate=sigmoid)")
source_ = pytest.mark.parametrize("name", list(SOURCES))


@pytest.fixture(autouse=True)
def _exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rounds RMSNorm to float32 whatever the input; formix does not."""
    for family in ("llama", "qwen2", "qwen3", "mistral"):
        module = getattr(hf.models, family)
        norm = next(v for k, v in vars(getattr(module, f"modeling_{family}")).items() if k.endswith("RMSNorm"))
        monkeypatch.setattr(norm, "forward", RMSNorm.forward)


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("name", [n for n in SOURCES if n != "xcit"])
def test_softmax_has_the_sources_outputs(name: str) -> None:
    source = make(name)
    given = inputs(source)
    softmax = formix.convert(source, "softmax")
    atol = 1e-8 if "dinov3" in name else 1e-10  # transformers and timm have the angles of its rotation in float32
    torch.testing.assert_close(run(softmax, given), run(source, given), rtol=0, atol=atol)
    if "input_ids" in given:
        mask = torch.ones_like(given["input_ids"])
        mask[1, ..., 8:] = 0
        masked = given | {"attention_mask": mask}
        ours, theirs = run(softmax, masked), run(source, masked)
        seen = mask.bool() if ours.dim() == 3 else slice(None)
        torch.testing.assert_close(ours[seen], theirs[seen], rtol=0, atol=1e-10)


def test_images_of_any_size_are_padded_as_the_source_does() -> None:
    source, images = make("vit-own"), torch.randn(2, 3, 21, 45, dtype=torch.float64)
    torch.testing.assert_close(formix.convert(source, "softmax")(images), source(images), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_positions_of_dinov2_are_resampled_as_transformers_does(kind: str, tmp_path) -> None:
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(**IMAGE | {"image_size": 64})
    source = getattr(hf, f"{kind}Model")(config).eval()
    torch.nn.init.normal_(source.embeddings.position_embeddings)
    formix.save(formix.convert(source, "softmax"), tmp_path)
    for side in (64, 40, 96):
        given = {"pixel_values": torch.randn(2, 3, side, side)}
        torch.testing.assert_close(run(formix.load(tmp_path), given), run(source, given), rtol=0, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_of_transformers_reads_any_size(gated: bool, tmp_path) -> None:
    torch.manual_seed(0)
    more = {"use_gated_mlp": True, "hidden_act": "silu"} if gated else {"rope_theta": 50.0}
    source = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**IMAGE, num_register_tokens=2, **more)).eval()
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.2)
    source.save_pretrained(tmp_path / "source")
    formix.save(formix.convert(tmp_path / "source", "softmax"), tmp_path / "softmax")
    ours = formix.load(tmp_path / "softmax")
    for size in ((16, 16), (40, 24), (96, 128)):
        images = torch.randn(2, 3, *size)
        theirs = source(images).last_hidden_state
        torch.testing.assert_close(ours.forward_features(images), theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"key_bias": True}, "none of keys; this model has query_bias=True, key_bias=True"),
        ({"query_bias": False}, "both or none"),
        ({"mlp_bias": False}, "mlp_bias=False"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; timm's trunk has 'gelu'"),
    ],
)
def test_a_dinov3_that_timms_trunk_cannot_be_is_refused(changed, words) -> None:
    with pytest.raises(ValueError, match=words):
        formix.convert(hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**IMAGE, **changed)), "relu")
    backbone = hf.DINOv3ViTBackbone(hf.DINOv3ViTConfig(**IMAGE))
    with pytest.raises(ValueError, match="--task=DINOv3ViTModel"):
        formix.convert(backbone, "relu")


def _heads() -> list[tuple[str, str]]:
    """transformers' model types with the classes that formix has for them."""
    stems = {
        "qwen2": ("Llama", "Qwen2"), "qwen3": ("Llama", "Qwen3"), "mistral": ("Llama", "Mistral"),
        "xlm-roberta": ("Roberta", "XLMRoberta"), "camembert": ("Roberta", "Camembert"),
    }  # fmt: skip
    return [
        (kind, name)
        for kind, (family, _) in transformers_source.TEXT.items()
        for task, c in FAMILIES[family][1].items()
        if task != "multiple-choice"  # reads [B, choices, N], and operations are counted on [B, N]
        and hasattr(hf, name := c.__name__.removeprefix("Formix").replace(*stems.get(kind, ("", ""))))
    ]


@pytest.mark.parametrize(("kind", "head"), _heads())
def test_every_head_keeps_every_tensor(kind: str, head: str) -> None:
    fields = {"distilbert": DISTIL, "gpt2": GPT2}.get(kind, GROUPED)
    source = getattr(hf, head)(hf.AutoConfig.for_model(kind, **fields))
    softmax = formix.convert(source, "softmax")
    assert not softmax.conversion.plan["new"]
    assert not softmax.conversion.plan["dropped"]
    assert equal(restore(softmax), source)


@source_
def test_every_design_goes_back_to_the_source_bit_for_bit(name: str) -> None:
    source = make(name)
    softmax = formix.convert(source, "softmax")
    served = 0
    for design in DESIGNS:
        try:
            model = formix.convert(source, design)
        except ValueError:
            continue  # a design that the family cannot have; its refusals are tested with the models
        served += 1
        assert equal(restore(model), source), design
        if name != "xcit":  # whose own mixer is none of formix's designs
            assert equal(formix.convert(model, "softmax"), softmax), design
    assert served >= 2


@pytest.mark.parametrize(
    "name", ["bert", "bert-features", "vit", "llama", "hf-dinov2-registers", "xcit", "dinov3", "relpos"]
)
def test_a_directory_brings_its_source_back(name: str, tmp_path) -> None:
    source = make(name).float()
    model = formix.convert(source, "relu")
    formix.save(model, tmp_path)
    loaded = formix.load(tmp_path)
    given = {k: v.float() if v.is_floating_point() else v for k, v in inputs(source).items()}
    torch.testing.assert_close(run(loaded, given), run(model, given), rtol=0, atol=0)
    assert equal(restore(loaded), source)
    record = json.loads((tmp_path / "conversion.json").read_text())
    assert record["plan"]["design"] == formix.convert(source, "relu").conversion.plan["design"]
    assert len(record["source_sha256"]) == 64
    assert {"torch", "timm", "transformers", "formix"} <= set(record["versions"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_a_decoder_generates_with_its_sources_settings(name: str, tmp_path) -> None:
    from formix.cli import main

    settings = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 17}
    source, out = tmp_path / "source", tmp_path / "out"
    make(name).float().save_pretrained(source)
    hf.GenerationConfig(**settings).save_pretrained(source)
    model = formix.convert(source, "relu")
    theirs = hf.GenerationConfig.from_pretrained(source).to_dict()
    assert main(["convert", str(source), "--design=relu", f"--out={out}"]) == 0
    for found in (model, formix.load(out), formix.convert(formix.load(out), "paf"), restore(formix.load(out))):
        assert found.generation_config.to_dict() == theirs
    assert hf.GenerationConfig.from_pretrained(out).to_dict() == theirs
    model.generation_config.temperature = 0.1  # of the copy alone
    assert formix.convert(source, "relu").generation_config.temperature == 0.6


def test_settings_of_generation_that_transformers_complains_of_are_kept(tmp_path) -> None:
    make("llama").float().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    formix.save(formix.convert(tmp_path / "source", "relu"), tmp_path / "out")
    assert formix.load(tmp_path / "out").generation_config.temperature == 0.6


def test_a_record_goes_along_when_a_loaded_model_is_saved(tmp_path) -> None:
    source = make("bert").float()
    formix.save(formix.convert(source, "sima"), tmp_path / "first")
    formix.save(formix.load(tmp_path / "first"), tmp_path / "second")
    formix.save(formix.load(tmp_path / "second"), tmp_path / "second")
    assert equal(restore(formix.load(tmp_path / "second")), source)
    formix.save(formix.create_model("bert-tiny", "relu", vocab_size=60), tmp_path / "second")
    assert sorted(p.name for p in (tmp_path / "second").iterdir()) == ["config.json", "model.safetensors"]


LOADERS = {
    "formix": lambda name: formix.load(name),
    "timm": lambda name: timm.create_model(f"local-dir:{name}", pretrained=True),
    "transformers": lambda name: hf.AutoModelForMaskedLM.from_pretrained(name),
}


@pytest.mark.parametrize(
    ("name", "loader"),
    [("bert", "transformers"), ("bert", "formix"), ("vit", "timm"), ("vit", "formix"), ("xcit", "timm")],
)
def test_every_loader_brings_the_record(name: str, loader: str, tmp_path, monkeypatch) -> None:
    source, softmax = make(name).float(), formix.convert(make(name).float(), "softmax")
    formix.save(formix.convert(source, "relu" if name == "xcit" else "parallel"), tmp_path / "converted")
    monkeypatch.chdir(tmp_path)
    loaded = LOADERS[loader]("converted")
    monkeypatch.chdir("/")
    shutil.rmtree(tmp_path / "converted")
    assert equal(restore(loaded), source)
    assert equal(formix.convert(loaded, "softmax"), softmax)
    formix.save(loaded, tmp_path / "again")
    assert equal(restore(formix.load(tmp_path / "again")), source)


def test_save_pretrained_writes_the_record(tmp_path) -> None:
    source = make("bert").float()
    formix.convert(source, "parallel").save_pretrained(tmp_path / "first")
    hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert equal(restore(formix.load(tmp_path / "second")), source)
    formix.create_model("bert-tiny", "relu", vocab_size=60).save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second" / "conversion.json").exists()


def test_a_record_that_is_missing_or_of_other_tensors_is_said(tmp_path, caplog) -> None:
    formix.save(formix.convert(make("bert").float(), "sima+parallel"), tmp_path)
    trunk = hf.AutoModel.from_pretrained(tmp_path)  # whose tensors have other names than those of the whole
    formix.convert(trunk, "softmax")
    assert "no record of a conversion that fits it" in caplog.text
    assert "encoder.layer.0.output.LayerNorm.weight" in caplog.text
    with pytest.raises(ValueError, match="with another head"):
        restore(trunk)
    other = formix.create_model(tmp_path, design=formix.design("relu+parallel"))
    caplog.clear()
    formix.convert(other, "softmax")
    assert "no record" in caplog.text
    (tmp_path / "conversion.safetensors").write_bytes(b"no tensors")
    caplog.clear()
    assert not hasattr(formix.load(tmp_path), "conversion_record")
    assert "conversion.json is damaged" in caplog.text
    caplog.clear()
    formix.convert(formix.create_model("bert-tiny", vocab_size=60), "activator")  # nothing that softmax has is new
    assert not caplog.text


@torch.no_grad()
def test_what_a_user_trained_stays_on_the_way_back(caplog) -> None:
    source = make("gpt2")
    model = formix.convert(source, "parallel")
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(formix.convert(model, "softmax").state_dict()[name], source.state_dict()[name])
    for parameter in model.parameters():
        parameter.mul_(1.01)
    trained = model.state_dict()[name]
    assert torch.equal(formix.convert(model, "softmax").state_dict()[name], trained)
    assert torch.equal(restore(model).state_dict()[name], trained)
    assert "6 tensors were trained after something was folded into them" in caplog.text
    again = formix.convert(model, "parallel")  # and nothing is folded twice
    torch.testing.assert_close(run(again, inputs(source)), run(model, inputs(source)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["gpt2", "vit", "llama"])
@pytest.mark.parametrize("casts", ["bfloat16", "float16", "float32", "float32 bfloat16", "bfloat16 float32"])
def test_a_cast_is_no_training(name: str, casts: str, tmp_path, caplog) -> None:
    source = make(name).float()
    model = formix.convert(source, "parallel")
    formix.save(model, tmp_path)
    for part in (model, loaded := formix.load(tmp_path)):
        for cast in casts.split():
            part.to(getattr(torch, cast))
    narrowest = torch.bfloat16 if "bfloat16" in casts else getattr(torch, casts)
    for part in (model, loaded):
        back = formix.convert(part, "softmax").to(narrowest)
        assert equal(back, formix.convert(source, "softmax").to(narrowest))
        assert equal(restore(part).to(narrowest), copy.deepcopy(source).to(narrowest))
    assert "were trained" not in caplog.text
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    formix.convert(model, "softmax")
    assert "were trained" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["vit", "hf-vit", "xcit", "bert", "llama"])
def test_a_directory_keeps_the_type_of_its_weights(name: str, dtype: torch.dtype, tmp_path) -> None:
    model = formix.convert(make(name).to(dtype), "relu")
    formix.save(model, tmp_path)
    loaded = formix.load(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert equal(loaded, model)


@pytest.mark.parametrize("name", ["eva02", "rope-vit", "vit"])
@pytest.mark.parametrize(
    "change",
    [lambda m: m.prune_intermediate_layers(1, prune_norm=True), lambda m: m.reset_classifier(5, "avg")],
    ids=["pruned", "reset"],
)
def test_what_timm_changes_in_its_models_converts(change: Callable, name: str) -> None:
    source = make(name)
    change(source)
    source.double()
    given = inputs(source)
    torch.testing.assert_close(run(formix.convert(source, "softmax"), given), run(source, given), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["vit", "eva02", "rope-vit", "dinov3", "relpos", "hf-dinov3"])
def test_half_precision_of_images(name: str, tmp_path) -> None:
    source = make(name).bfloat16()
    given = {"pixel_values": inputs(source)["pixel_values"].bfloat16()}
    expected = run(source, given).float()
    same = run(formix.convert(source, "softmax"), given).float()
    assert (same - expected).abs().max() < 0.05 * expected.abs().max()
    model = formix.convert(source, "relu")
    formix.save(model, tmp_path)
    assert torch.equal(run(formix.load(tmp_path), given), run(model, given))


def test_the_plan_lists_all_that_happens() -> None:
    source = make("gpt2")
    made = plan(source, "relu+parallel", keep="softmax:0")
    assert [change.layer for change in made.layers] == [1, 2]
    assert made.layers[0].mixer == "softmax -> pointwise"
    assert set(made.dropped) == {f"transformer.h.{i}.ln_2.{w}" for i in (1, 2) for w in ("weight", "bias")}
    assert set(made.folded) == {f"transformer.h.{i}.mlp.c_fc.{w}" for i in (1, 2) for w in ("weight", "bias")}
    assert len(made.kept) + len(made.folded) + len(made.dropped) == len(source.state_dict())
    assert made.parameters == (sum(p.numel() for p in source.parameters()),
                               sum(p.numel() for p in source.parameters()) - 4 * 32)  # fmt: skip
    assert made.flops[0] == made.flops[1] > 0
    assert "layer 1: softmax -> pointwise; series -> parallel, pre-norm" in str(made)
    assert str(formix.conversion.plan(source, "relu+parallel", keep="softmax:0")) == str(made)  # a function still

    optional = plan(source, "softmax(gate=sigmoid)", layers=[1])
    assert [(change.layer, change.mixer) for change in optional.layers] == [(1, "softmax -> softmax(gate=sigmoid)")]
    gated = plan(make("bert"), "activator")
    fresh = {w.name.rpartition(".attention.unit.")[2]: w.rule for w in gated.new}
    assert fresh["fc3.weight"].startswith("0,")
    assert "query.weight" in " ".join(gated.dropped)


@source_
def test_operations_are_counted_or_said_to_be_unknown(name: str, caplog) -> None:
    design = "sima" if name in ("xcit", "vit") else "relu"
    before, after = plan(make(name), design).flops
    if name in UNCOUNTED:
        assert (before, after) == (None, None)
        assert "are not counted" in caplog.text
    else:
        assert (after or 0) > 0
        assert (before or 0) > 0 or name == "xcit"
        assert "are not counted" not in caplog.text


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "eva02", "relpos", "hf-dinov3-gated"])
def test_a_folded_norm_is_the_second_norm_of_the_layers_input(name: str) -> None:
    """With the mixer's branch at nothing, a parallel layer whose norm was folded is the series layer."""
    source = make(name)
    for part, parameter in source.named_parameters():
        if re.search(r"(attn\.proj|attention\.o_proj)\.", part):
            nn.init.zeros_(parameter)
    given = inputs(source)
    torch.testing.assert_close(run(formix.convert(source, "parallel"), given), run(source, given), rtol=0, atol=1e-9)


def test_a_bias_that_no_ffn_can_take_in_is_said_to_be_left_out(caplog) -> None:
    source = make("vit-own")
    for name, parameter in source.named_parameters():
        if re.search(r"norm[12]\.bias|attn\.proj", name):
            nn.init.zeros_(parameter)
    given = inputs(source)
    torch.testing.assert_close(run(formix.convert(source, "parallel"), given), run(source, given), rtol=0, atol=1e-9)
    assert "no bias that could take blocks.0.norm2.bias" in caplog.text


def test_conversion_is_there_with_formix() -> None:
    script = "import formix; print(formix.conversion.plan.__name__, formix.conversion.restore.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["plan", "restore"]


def test_layers_and_keep_choose_the_same_hybrid() -> None:
    source = make("bert")
    some, rest = formix.convert(source, "relu+paf", layers="1-2"), formix.convert(source, "relu+paf", keep="softmax:0")
    assert some.config.design == rest.config.design
    kinds = [(layer.mixer.kind, layer.layout.parallel) for layer in some.bert.encoder.layers]
    assert kinds == [("softmax", False), ("pointwise", True), ("pointwise", True)]
    wired = formix.convert(source, "skip", layers=[-1])
    assert [layer.source for layer in wired.bert.encoder.layers] == [None, None, 1]


def test_layers_that_stay_are_the_sources_own() -> None:
    source = formix.convert(make("bert"), "relu+skip")
    some = formix.convert(source, "paf", layers="1")
    chosen, depth = formix.design(some.config.design), 3
    kept = [chosen.layer(i, depth) for i in (0, 2)]
    was = [formix.design(source.config.design).layer(i, depth) for i in (0, 2)]
    assert [(k.mixer, k.layout, k.source) for k in kept] == [(w.mixer, w.layout, w.source) for w in was]
    assert chosen.layer(1, depth).mixer.kind == "softmax"
    assert [change.layer for change in plan(source, "paf", layers="1").layers] == [1]
    assert "layer 2: pointwise; series; none reads layer 1's any more" in str(plan(source, "relu"))
    same = formix.convert(formix.convert(make("bert"), "relu"), "relu", layers="1")
    torch.testing.assert_close(
        run(same, inputs(same)), run(formix.convert(make("bert"), "relu"), inputs(same)), rtol=0, atol=1e-10
    )


def test_half_precision_leaves_the_rotation_exact() -> None:
    model = formix.convert(make("llama").bfloat16(), "relu")
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("name", ["bert", "vit", "xcit", "dinov3"])
def test_a_teacher_is_the_source(name: str) -> None:
    source = make(name)
    given = inputs(source)
    torch.testing.assert_close(run(as_teacher(source), given), run(source, given), rtol=0, atol=1e-10)
    own = formix.convert(source, "relu")
    torch.testing.assert_close(run(as_teacher(own), given), run(own, given), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in source.parameters())


def _offloaded() -> nn.Module:
    return accelerate.cpu_offload(make("vit").float(), torch.device("cpu"))


def _mixed() -> nn.Module:
    model = make("vit").bfloat16()
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.float()
    return model


def _quantised() -> nn.Module:
    model = make("bert").float()
    model.config.quantization_config = {"bits": 4}
    return model


@pytest.mark.parametrize(
    ("source", "design", "options", "words"),
    [
        (lambda: make("gpt2"), "sima", {}, "SimA cannot be causal"),
        (lambda: make("gpt2"), "sima", {"layers": "0"}, "SimA cannot be causal"),
        (lambda: nn.Linear(2, 2), "relu", {}, "VisionTransformer"),
        (lambda: hf.T5Model(hf.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)), "relu", {}, "Mistral"),
        (lambda: torch.compile(make("bert")), "relu", {}, "compiled"),
        (lambda: nn.DataParallel(make("bert")), "relu", {}, "wrapped"),
        (_quantised, "relu", {}, "quantised"),
        (lambda: make("bert").to(torch.float8_e4m3fn), "relu", {}, "quantised"),
        (lambda: make("vit").to(torch.float8_e5m2), "relu", {}, "quantised"),
        (lambda: make("bert").to("meta"), "relu", {}, "not in memory"),
        (_mixed, "relu", {}, r"several types \(cls_token in torch.bfloat16, .*norm1.weight in torch.float32\)"),
        (_offloaded, "relu", {}, "not in memory"),
        (lambda: "no-such-model", "relu", {}, "no directory, timm name or transformers id"),
        (lambda: make("bert"), "relu", {"layers": "7"}, "layers 0 to 2"),
        *((lambda: make("bert"), "relu", {"layers": n}, "0,2,4-7") for n in ("0,2-1", "first", "")),
        *((lambda: make("bert"), "relu", {"layers": n}, "whole numbers") for n in (1, True, [None], [1.5], [True])),
        *((lambda: make("bert"), "relu", {"keep": k}, "softmax:NUMBERS") for k in ("relu:0", "", [0], 0, True)),
        (lambda: make("bert"), "relu", {"keep": "softmax:0-2"}, "no layer to convert"),
        (lambda: formix.convert(make("bert"), "relu"), "paf", {"keep": "softmax:0"}, "in layer 0 is pointwise"),
        (lambda: make("xcit"), "sima", {"layers": "0"}, "cross-covariance"),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", depth=1, act_layer="relu"),
            "relu",
            {},
            r"ReLU.* as blocks\.0\.mlp\.act",
        ),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1, norm_layer="rmsnorm"), "relu", {}, r"norm1\.bias"),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1, norm_layer=nn.LayerNorm), "relu", {}, "eps=1e-05"),
        (lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(num_hidden_layers=1)), "relu", {}, "head.*--task"),
        (lambda: hf.BertForPreTraining(hf.BertConfig(**TEXT)), "relu", {}, r"head.* another \(--task\): BertForMasked"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_a_sentence(source, design, options, words) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        formix.convert(source(), design, **options)
    assert str(refused.value).count("\n") == 0


def test_a_source_that_is_sharded_without_a_wrapper_is_refused(tmp_path) -> None:
    """Tensor parallelism leaves the modules as they are, and their parameters are distributed tensors."""
    source = make("bert")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        parallelize_module(source, mesh, {"bert.encoder.layer.0.intermediate.dense": ColwiseParallel()})
        with pytest.raises(ValueError, match=r"layer\.0\.intermediate\.dense\.weight is sharded over processes"):
            formix.convert(source, "relu")
    finally:
        torch.distributed.destroy_process_group()


def _set(part: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A change of a model by hand: what `change` makes of a part in its place."""

    def by_hand(model: nn.Module) -> None:
        place, _, name = part.rpartition(".")
        setattr(model.get_submodule(place), name, change(model.get_submodule(part)).double())

    return by_hand


def _untie(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)


def _weight_norm(linear: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(linear)


def _pruned(linear: nn.Module) -> nn.Module:
    return prune.l1_unstructured(linear, "weight", amount=0.5)


@pytest.mark.parametrize(
    ("name", "by_hand", "words"),
    [
        ("bert", _set("bert", torch.compile), r"bert\._orig_mod.* before torch\.compile"),
        ("llama", _set("model.layers.1", torch.compile), r"layers\.1\._orig_mod.* before torch\.compile"),
        ("vit", _set("blocks.1", torch.compile), r"blocks\.1\._orig_mod.* before torch\.compile"),
        ("vit", _set("blocks.2.mlp.fc1", _pruned), r"blocks\.2\.mlp\.fc1\.weight_mask.*prune\.remove"),
        ("bert", _set("bert.encoder.layer.0.output.dense", _weight_norm), "remove_parametrizations"),
        ("gpt2", _set("transformer.h.0.ln_1", nn.utils.weight_norm), "remove_weight_norm"),
        ("roberta", _set("classifier.out_proj", lambda _: nn.Linear(32, 9)), r"\[9, 32\] as classifier\.out_proj"),
        ("vit", _set("head", lambda _: nn.Sequential(nn.Linear(32, 7))), r"nothing as head\.weight"),
        ("bert", _set("bert.encoder.layer", lambda layers: layers[:2]), r"nothing as bert\.encoder\.layer\.2\."),
        ("bert", _set("bert.encoder.layer.0.intermediate.intermediate_act_fn", lambda _: nn.ReLU()), r"ReLU\(\) as b"),
        ("llama", _set("model.layers.0.mlp.act_fn", lambda _: nn.Identity()), r"nothing as model\..*\.act_fn"),
        ("distilbert", _set("distilbert.embeddings.LayerNorm", lambda _: nn.LayerNorm(32, eps=0.1)), r"eps=0\.1"),
        ("gpt2", _untie, r"lm_head\.weight differs from transformer\.wte\.weight.* tie_word_embeddings"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("own", [False, True], ids=["source", "converted"])
def test_what_was_changed_by_hand_is_refused(own, name, by_hand, words) -> None:
    source = make(name)
    if own:
        source = formix.convert(source, "relu")
    by_hand(source)
    with pytest.raises(ValueError, match=words):
        formix.convert(source, "paf")


def test_rotary_positions_that_the_name_does_not_give_back_are_refused() -> None:
    source = timm.create_model("vit_small_patch16_rope_224", img_size=32, depth=2, rope_temperature=77.0)
    with pytest.raises(ValueError, match=r"'temperature': 77\.0.* as rope, and a new Eva"):
        formix.convert(source, "relu")


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_weights_that_are_no_numbers_go_there_and_back(name) -> None:
    """In tied tensors (GPT-2's embeddings) and in folded ones; a NaN is not equal to itself."""
    source = make(name)
    with torch.no_grad():
        for tensor in source.parameters():
            tensor.view(-1)[0] = float("nan")
    ours, theirs = restore(formix.convert(source, "parallel")).state_dict(), source.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k].view(torch.uint8), theirs[k].view(torch.uint8)) for k in theirs)


def test_a_tensor_that_no_rule_brings_is_never_random(monkeypatch) -> None:
    monkeypatch.setattr(transformers_source, "RULES", {})  # as if a class had names of its own
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight has no weight in this LlamaForQuestionAnswering"
    ):
        formix.convert(make("llama-answers"), "softmax")


def test_a_source_compiled_in_place_loses_nothing() -> None:
    """`Module.compile()` leaves the modules and tensors as they are; the result is not compiled."""
    for name in ("bert", "vit"):
        source = make(name)
        source.compile()
        model = formix.convert(source, "relu")
        assert equal(restore(model), source)
        assert model._compiled_call_impl is None


def test_the_command_line_converts_a_directory(tmp_path, capsys) -> None:
    from formix.cli import main

    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "vocab.txt").write_text("[PAD]\n")
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    assert main(["convert", str(tmp_path / "source"), "--design=paf", "--dry-run"]) == 0
    assert "series -> parallel, post-norm" in capsys.readouterr().out
    search = ["--search=1", "--recover=text:nowhere", "--dry-run"]
    assert main(["convert", str(tmp_path / "source"), "--design=paf", *search]) == 0
    assert "converts those that hurt least, 1 at most" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "source"), "--design=paf", f"--out={tmp_path / 'out'}"]) == 0
    model = hf.AutoModel.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "FormixBertModel"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    (tmp_path / "source" / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    assert main(["convert", str(tmp_path / "source"), "--design=relu", f"--out={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "vocab.txt").read_text() == "[PAD]\n[UNK]\n"
    for flags, words in (
        ([], "out is missing"),
        (["--max-loss=1"], "give --search=N too"),
        (["--search=1"], "--search needs --recover"),
        (['--recovery={"stages": "match:3s"}'], "recovery has 'stages' but there is no recovery"),
        (["--out=x", "--checkpoint=x.pth"], "directory of transformers', which takes no checkpoint"),
        (["--out=x", '--model_args={"num_classes": 3}'], "takes no model_args"),
        (["--out=x", "--design=paf,nope"], "'nope' is no design"),
        (["--out=x", "--threads=0"], "threads is 0; it must be 1 to 4096"),
        (["--out=x", "--probe=digits"], "probe is for models of images, and the source is a BertModel"),
        (["--out=x", "--perplexity=text:x"], "perplexity is for language models that write"),
        (["--out=x", '--recovery={"img_size": 32}'], "img_size is for models of images, and the source is a BertModel"),
        (
            ["--out=x", "--recover=text:x", '--recovery={"batch_size": "many"}'],
            "batch_size is many; it must be a whole",
        ),
        (["--out=x", "--sts=x.tsv", "--source=vit_tiny_patch16_224", "--task=BertModel"], "takes no task"),
    ):
        assert main(["convert", str(tmp_path / "source"), "--design=paf", *flags]) == 2
        assert words in capsys.readouterr().err
    make("hf-vit").save_pretrained(tmp_path / "images")
    flags = ["--design=paf", "--out=x", '--recovery={"tokenizer": "x"}']
    assert main(["convert", str(tmp_path / "images"), *flags]) == 2
    assert "tokenizer is for models of text, and the source is a ViTFor" in capsys.readouterr().err


def test_a_training_run_s_directory_is_a_source_in_python_too(tmp_path) -> None:
    model = formix.create_model("bert-tiny", task="features", **TEXT)
    formix.save(model, tmp_path / "model")
    (tmp_path / "config.json").write_text('{"model": "bert-tiny", "data": "glue:sst2"}')
    (tmp_path / "checkpoints").mkdir()
    for place in (tmp_path, str(tmp_path)):
        assert equal(formix.convert(place, "relu"), model)
        assert plan(place, "relu").source == "FormixBertModel"


def test_a_conversion_whose_record_is_damaged_is_done_again(tmp_path, caplog) -> None:
    from formix.cli import main

    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(tmp_path / "source")
    command = ["convert", str(tmp_path / "source"), "--design=paf", f"--out={tmp_path / 'out'}"]
    assert main(command) == 0
    record = (tmp_path / "out" / "conversion.json").read_text()
    (tmp_path / "out" / "conversion.json").write_text(record[:100])
    assert main(command) == 0
    assert "conversion.json is damaged" in caplog.text
    assert (tmp_path / "out" / "conversion.json").read_text() == record


def test_the_record_says_which_model_was_converted(tmp_path) -> None:
    from formix.cli import main

    places = {"bert": tmp_path / "bert", "formix": tmp_path / "formix"}
    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(places["bert"])
    formix.save(formix.create_model("bert-tiny", design="relu", task="features", **TEXT), places["formix"])
    for name, place in places.items():
        assert main(["convert", str(place), "--design=paf", f"--out={tmp_path / name}-paf"]) == 0
        assert main(["convert", f"{tmp_path / name}-paf", "--design=sima", f"--out={tmp_path / name}-sima"]) == 0
        for design in ("paf", "sima"):  # the first source of a chain
            source = json.loads((tmp_path / f"{name}-{design}" / "conversion.json").read_text())["source"]
            assert source["place"] == str(place)
            assert source["class"] == {"bert": "BertModel", "formix": "FormixBertModel"}[name]
    assert source["design"]["mixer"]["kind"] == "pointwise"
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_heads=2, embed_dim=8, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    arguments = '--model_args={"depth": 1, "num_heads": 2, "embed_dim": 8, "num_classes": 0}'
    flags = [f"--checkpoint={tmp_path / 'vit.pth'}", arguments, "--design=relu", f"--out={tmp_path / 'vit-relu'}"]
    assert main(["convert", "vit_tiny_patch16_224", *flags]) == 0
    source = json.loads((tmp_path / "vit-relu" / "conversion.json").read_text())["source"]
    assert (source["place"], source["checkpoint"]) == ("vit_tiny_patch16_224", str(tmp_path / "vit.pth"))
    assert equal(restore(formix.load(tmp_path / "vit-relu")), vit)


def test_the_modules_of_a_sentence_model_go_along(tmp_path) -> None:
    from formix.cli import main

    source, out = tmp_path / "source", tmp_path / "out"
    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(source)
    for place, name in ((source, "sentence_bert_config.json"), (source / "1_Pooling", "config.json"), (tmp_path, "x")):
        place.mkdir(exist_ok=True)
        (place / name).write_text('{"pooling_mode": "cls"}')
    places = ["", "1_Pooling", "2_Normalize", "..", str(tmp_path)]  # one that needs no files, two that are not its own
    (source / "modules.json").write_text(json.dumps([{"idx": i, "path": p} for i, p in enumerate(places)]))
    assert main(["convert", str(source), "--design=relu", f"--out={out}"]) == 0
    copied = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.suffix == ".json"}
    assert set(copied) == {
        "config.json",
        "conversion.json",
        "modules.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
    }
    assert copied["1_Pooling/config.json"].read_text() == '{"pooling_mode": "cls"}'
    assert formix.load(out).config.hidden_size == 32


def test_what_lies_beside_a_model_on_the_hub_goes_along(tmp_path) -> None:
    """In a process of its own: the place of the hub's cache is read when its library is imported."""
    cached = tmp_path / "models--org--tiny"
    snapshot = cached / "snapshots" / "abc"
    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(snapshot)
    hf.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}).save_pretrained(snapshot)
    (snapshot / "modules.json").write_text('[{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]')
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "1_Pooling" / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    command = ["convert", "org/tiny", "--design=relu", f"--out={tmp_path / 'out'}"]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "formix.cli", *command], env=environment, check=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (snapshot / name).read_bytes()
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]["place"] == "org/tiny"


def test_the_command_line_overwrites_nothing_but_conversions(tmp_path, capsys) -> None:
    from formix.cli import main

    source, out = tmp_path / "source", tmp_path / "out"
    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(source)
    before = (source / "config.json").read_text()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "paper.txt").write_text("mine")
    for place, words in (("source", "is the source itself"), ("notes", "is no conversion of formix's")):
        assert main(["convert", str(source), "--design=paf", f"--out={tmp_path / place}"]) == 2
        assert words in capsys.readouterr().err
    assert (source / "config.json").read_text() == before
    for design, said in (("paf", False), ("paf", True), ("relu", False), ("relu", True)):
        assert main(["convert", str(source), f"--design={design}", f"--out={out}"]) == 0
        assert ("holds this conversion already" in capsys.readouterr().out) == said
    assert json.loads((out / "conversion.json").read_text())["request"]["design"] == "relu"
    torch.manual_seed(1)
    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(source)  # other weights
    (out / "search.json").write_text("{}")
    for place, words in ((out, "old"), (source, "new")):
        (place / "vocab.txt").write_text(words)
    (out / "report.html").write_text("of another recovery")
    assert main(["convert", str(source), "--design=relu", f"--out={out}"]) == 0
    assert (out / "vocab.txt").read_text() == "new"
    assert not (out / "report.html").exists()
    assert not (out / "search.json").exists()
    assert "already" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_source_that_gives_attention_weights_becomes_a_model_that_says_it_does_not(name, caplog) -> None:
    source = make(name)
    source.config._attn_implementation = "eager"  # transformers' others have no weights to give
    source.config.output_attentions = True
    model = formix.convert(source, "relu").eval()
    assert caplog.text.count("asks for attention weights") == 1
    assert model.config.output_attentions is False
    assert model(torch.ones(1, 5, dtype=torch.long))[0].isfinite().all()
    assert restore(model).config.output_attentions is True
