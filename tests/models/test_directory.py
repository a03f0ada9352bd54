"""save and load: equal logits in a new process for every design, and one sentence for everything damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from timm.models import adapt_input_conv

import formix

VIT = {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
BERT = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96, "vocab_size": 50}
GPT2 = {"n_layer": 3, "n_embd": 48, "n_head": 3, "vocab_size": 50, "n_positions": 32}
FAMILIES = {"vit": ("vit_tiny_patch16_224", VIT), "bert": ("bert-tiny", BERT), "gpt2": ("gpt2-nano", GPT2)}
DESIGNS = [*formix.list_designs(), "relu+paf+skip", "relu(gate=silu,qk_norm=true)", "activator(official=true)"]


def refusal(family, design):
    return formix.design(design).causal_refusal(3) if family == "gpt2" else None


CASES = [(family, design) for family in FAMILIES for design in DESIGNS if not refusal(family, design)]


def make(family, design="relu", **more):
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    return formix.create_model(name, design, **options, **more).eval()


def inputs(family):
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return torch.randn(2, 3, 32, 32, generator=generator)
    return torch.randint(0, 50, (2, 9), generator=generator)


def logits(model, family):
    with torch.no_grad():
        out = model(inputs(family))
    return out if family == "vit" else out.logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One directory per family and design, and the logits of the models in them."""
    root, expected = tmp_path_factory.mktemp("models"), {}
    for family, design in CASES:
        model, key = make(family, design), f"{family}-{DESIGNS.index(design)}"
        formix.save(model, root / key)
        expected[f"{family} {design}"] = (str(root / key), logits(model, family))
    return root, expected


PROGRAM = """
import sys, torch, formix
root = sys.argv[1]
cases, inputs = torch.load(f"{root}/cases.pt"), torch.load(f"{root}/inputs.pt")
torch.set_num_threads(1)
out = {}
for name, directory in cases.items():
    with torch.no_grad():
        y = formix.load(directory)(inputs[name.split()[0]])
    out[name] = y if isinstance(y, torch.Tensor) else y.logits
torch.save(out, f"{root}/logits.pt")
"""


@pytest.fixture(scope="module")
def reloaded(saved):
    """The logits that a new process computes from the directories."""
    root, expected = saved
    torch.save({name: directory for name, (directory, _) in expected.items()}, root / "cases.pt")
    torch.save({family: inputs(family) for family in FAMILIES}, root / "inputs.pt")
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(root)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return torch.load(root / "logits.pt")


@pytest.mark.parametrize(("family", "design"), CASES, ids=[f"{f}-{d}" for f, d in CASES])
def test_equal_logits_in_a_new_process(family, design, saved, reloaded):
    expected = saved[1][f"{family} {design}"][1]
    assert expected.isfinite().all()
    assert torch.equal(reloaded[f"{family} {design}"], expected)


def test_the_config_holds_the_design(saved):
    for name, (directory, _) in saved[1].items():
        with open(f"{directory}/config.json") as file:
            config = json.load(file)
        stored = config["model_args"]["design"] if "architecture" in config else config["design"]
        assert formix.design(stored) == formix.design(name.split(" ", 1)[1])


FOREIGN = """
import sys
import timm, torch
from transformers import AutoModel, AutoConfig
attempts = {
    "timm": lambda d: timm.create_model(f"local-dir:{d}", pretrained=True),
    "model": AutoModel.from_pretrained,
    "config": AutoConfig.from_pretrained,
}
for kind, directory in (pair.split("=", 1) for pair in sys.argv[1:]):
    try:
        attempts[kind](directory)
    except Exception as error:
        print(kind, "refused", "formix" in str(error))
    else:
        print(kind, "loaded")
"""


def test_programs_without_formix_fail_loudly(saved):
    """Neither timm nor transformers takes a directory of formix's for one of its own."""
    root = saved[0]
    arguments = [f"timm={root}/vit-1", f"model={root}/bert-1", f"config={root}/bert-1", f"model={root}/gpt2-1"]
    run = subprocess.run([sys.executable, "-c", FOREIGN, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:4] == [f"{kind} refused True" for kind in ("timm", "model", "config", "model")]


# ------------------------------------------------------------------------------------------------ other weights


@pytest.mark.parametrize("family", FAMILIES)
def test_another_design_from_a_directory_keeps_the_weights(family, saved):
    directory = saved[1][f"{family} relu"][0]
    model = formix.create_model(directory, "softmax").eval()
    expected = saved[1][f"{family} softmax"][1]  # made with the same seed
    assert torch.allclose(logits(model, family), expected, atol=1e-6)
    own = formix.create_model(directory).eval()
    assert torch.equal(logits(own, family), saved[1][f"{family} relu"][1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_design_with_weights_that_a_directory_lacks_is_refused(family, saved):
    directory = saved[1][f"{family} relu"][0]
    for design in ("relu(gate=silu)", "relu(qk_norm=true)"):
        with pytest.raises(ValueError, match=r"has no weights for \d+ parameters of this design"):
            formix.create_model(directory, design)


@pytest.mark.parametrize("architectures", [["BertForNextSentencePrediction"], None], ids=str)
def test_a_head_that_a_directory_lacks_has_to_be_asked_for(architectures, tmp_path):
    stock = hf.BertForNextSentencePrediction(hf.BertConfig(**BERT))
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    with pytest.raises(ValueError, match=r"no weights for the head of a FormixBertForMaskedLM .*Give task"):
        formix.create_model(tmp_path, "relu")
    for task in ("masked-lm", "features"):
        model = formix.create_model(tmp_path, "relu", task=task)
        assert torch.equal(model.get_input_embeddings().weight, stock.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_hiden_layers": 2}, "'num_hiden_layers': no field of FormixBertConfig"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number, 1 or more"),
        ({"hidden_act": "gellu"}, "hidden_act is 'gellu'; it must be one of"),
        ({"layer_norm_eps": "small"}, "cannot be built with {'layer_norm_eps': 'small'}"),
    ],
    ids=str,
)
def test_fields_of_a_text_directory_are_checked_as_those_of_a_name(change, match, saved):
    root, _ = saved
    with pytest.raises(ValueError, match=match):
        formix.create_model(root / "bert-0", "relu", **change)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("bert-tiny", "pad_token_id", 10**6),
        ("gpt2-nano", "n_inner", -3),
        ("llama-nano", "rope_parameters", {"rope_type": "spiral"}),
        ("llama-nano", "head_dim", 5),
        ("llama-nano", "layer_types", ["chunked_attention"] * 4),
        ("cvt-13", "depth", 3),
        ("cvt-13", "depth", [1, 0, 1]),
        ("cvt-13", "depth", [1, 1]),
        ("cvt-13", "num_heads", [0, 1, 1]),
        ("cvt-13", "in_chans", 0),
        ("cvt-13", "num_labels", -1),
    ],
    ids=str,
)
def test_fields_that_no_model_can_have_are_named(name, field, value):
    with pytest.raises(ValueError, match="A head has 5 channels" if field == "head_dim" else field):
        formix.create_model(name, "relu", **{field: value})


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "activator_32_p4", "relu_vit_small_patch16_224"])
def test_arguments_of_an_image_directory_are_checked_as_those_of_a_name(name, tmp_path):
    sizes = {"img_size": 32, "depth": 1, "num_classes": 5}
    formix.save(formix.create_model(name, "sima" if name.startswith("xcit") else None, **sizes), tmp_path)
    for wrong in ({"colour": "red"}, {"patch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            formix.create_model(tmp_path, **wrong)


@pytest.mark.parametrize("kind", ["distilbert", "mistral"])
def test_directories_that_only_convert_reads_are_sent_there(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"model_type '{kind}'.*formix convert {tmp_path} --design=NAME"):
        formix.create_model(tmp_path, "relu")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_number_of_classes_asks_for_a_classifier(family, saved):
    root, _ = saved
    model = formix.create_model(root / f"{family}-0", "relu", num_classes=5, pad_token_id=0)
    assert type(model).__name__.endswith("ForSequenceClassification")
    with torch.no_grad():
        assert model(inputs(family)).logits.shape == (2, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
@pytest.mark.parametrize("name", ["bert-tiny", "cvt-13"])
def test_a_type_of_the_weights_is_that_of_the_model(name, dtype):
    sizes = {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3]} if name == "cvt-13" else BERT
    model = formix.create_model(name, "relu", dtype=dtype, **sizes)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels_adapt_the_patch_embedding_as_timm_does(channels, tmp_path, caplog):
    model = formix.create_model("vit_tiny_patch16_224", design="relu", img_size=32, depth=1, num_classes=3).eval()
    formix.save(model, tmp_path)
    adapted = formix.create_model(tmp_path, in_chans=channels).eval()
    weight = adapt_input_conv(channels, model.patch_embed.proj.weight)
    assert torch.equal(adapted.patch_embed.proj.weight, weight)
    assert len(adapted.pretrained_cfg["mean"]) == adapted.pretrained_cfg["input_size"][0] == channels
    assert f"adapted from 3 to {channels} channels" in caplog.text
    formix.save(adapted, tmp_path / "adapted")
    x = torch.randn(1, channels, 32, 32)
    assert torch.equal(formix.load(tmp_path / "adapted")(x), adapted(x))
    with pytest.raises(ValueError, match=f"in_chans is 4, and the weights are for {channels} channels"):
        formix.create_model(tmp_path / "adapted", in_chans=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_again_over_an_older_model(family, tmp_path):
    formix.save(make(family, "softmax"), tmp_path)
    model = make(family, "skip")
    formix.save(model, tmp_path)
    assert torch.equal(logits(formix.load(tmp_path), family), logits(model, family))
    assert {p.name for p in tmp_path.iterdir()} <= {"config.json", "model.safetensors", "generation_config.json"}


def test_a_model_in_half_precision_keeps_its_numbers(tmp_path):
    model = make("vit", "relu").to(torch.bfloat16)
    formix.save(model, tmp_path)
    loaded = formix.load(tmp_path)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight.float(), model.state_dict()[name].float()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "name", ["vit_relpos_small_patch16_224", "eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384"]
)
def test_buffers_that_are_not_stored_have_the_weights_type(name, dtype, tmp_path):
    """Relative coordinates, the keys' bias of zeros, angles of positions."""
    model = formix.create_model(name, "relu", depth=1, img_size=56, patch_size=14, num_classes=5).eval().to(dtype)
    formix.save(model, tmp_path)
    x = torch.randn(1, 3, 56, 56, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(formix.load(tmp_path)(x), model(x))


# ------------------------------------------------------------------------------------------------------- refused


def damage_config(change):
    def damage(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def damage_design(change):
    def damage(config):
        holder = config.get("model_args", config)
        holder["design"] = change(holder["design"])
        return config

    return damage_config(damage)


def damage_weights(change):
    def damage(directory):
        path = directory / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return damage


def cut(name, keep):
    def damage(directory):
        path = directory / name
        path.write_bytes(path.read_bytes()[:keep])

    return damage


def largest(weights):
    return max(weights, key=lambda k: weights[k].numel() if "blocks" in k or "layer" in k or ".h." in k else 0)


DAMAGES = {
    "config_missing": lambda d: (d / "config.json").unlink(),
    "config_cut": cut("config.json", 40),
    "config_empty": cut("config.json", 0),
    "config_binary": lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00\x81"),
    "config_list": damage_config(lambda c: [c]),
    "config_of_nothing": damage_config(lambda c: {}),
    "design_field": damage_design(lambda d: d | {"temperature": 2}),
    "design_mixer": damage_design(lambda d: d | {"mixer": {"kind": "mamba"}}),
    "design_mixer_field": damage_design(lambda d: d | {"mixer": d["mixer"] | {"power": 3}}),
    "design_text": damage_design(lambda d: "rellu"),
    "design_number": damage_design(lambda d: 3),
    "weights_missing": lambda d: (d / "model.safetensors").unlink(),
    "weights_empty": cut("model.safetensors", 0),
    "weights_cut_in_the_header": cut("model.safetensors", 100),
    "weights_cut": cut("model.safetensors", 20_000),
    "weights_other": lambda d: (d / "model.safetensors").write_bytes(b"not a tensor" * 99),
    "weight_missing": damage_weights(lambda w: {k: v for k, v in w.items() if k != largest(w)}),
    "weight_shape": damage_weights(lambda w: w | {largest(w): w[largest(w)][:-1].clone()}),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_directory_is_refused_in_one_sentence(family, damage, saved, tmp_path):
    shutil.copytree(saved[1][f"{family} relu"][0], tmp_path / "model")
    DAMAGES[damage](tmp_path / "model")
    with pytest.raises(ValueError, match=r"\w") as refused:
        formix.load(tmp_path / "model")
    assert type(refused.value) is ValueError
    assert len(str(refused.value)) < 900
    assert "Traceback" not in str(refused.value)


VIT_CONFIGS = {
    "no_arguments": lambda c: {k: v for k, v in c.items() if k != "model_args"},
    "arguments_list": lambda c: c | {"model_args": [1]},
    "no_base": lambda c: c | {"model_args": {k: v for k, v in c["model_args"].items() if k != "base"}},
    "no_design": lambda c: c | {"model_args": {k: v for k, v in c["model_args"].items() if k != "design"}},
    "unknown_base": lambda c: c | {"model_args": c["model_args"] | {"base": "vit_enormous"}},
    "unknown_argument": lambda c: c | {"model_args": c["model_args"] | {"colour": 3}},
    "depth": lambda c: c | {"model_args": c["model_args"] | {"depth": 4}},
    "architecture": lambda c: c | {"architecture": "formix_unknown"},
    "timm_s": lambda c: c | {"architecture": "vit_tiny_patch16_224"},
    "architecture_number": lambda c: c | {"architecture": [3]},
}


@pytest.mark.parametrize("case", VIT_CONFIGS)
def test_a_changed_image_config_is_refused(case, saved, tmp_path):
    shutil.copytree(saved[1]["vit relu"][0], tmp_path / "model")
    damage_config(VIT_CONFIGS[case])(tmp_path / "model")
    with pytest.raises(ValueError, match=r"\w") as refused:
        formix.load(tmp_path / "model")
    assert type(refused.value) is ValueError


@pytest.mark.parametrize("change", [{"design": None}, {"model_type": "bert"}, {"model_type": "formix_mamba"}], ids=str)
def test_a_changed_text_config_is_refused(change, saved, tmp_path):
    """Above all the one whose design is gone: it must not come back as softmax."""
    shutil.copytree(saved[1]["bert relu"][0], tmp_path / "model")
    damage_config(lambda c: c | change)(tmp_path / "model")
    with pytest.raises(ValueError, match=r"design|model_type"):
        formix.load(tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_more_layers_than_the_config_has_are_refused(family, saved, tmp_path):
    """With fewer layers the model would load and give other logits."""
    shutil.copytree(saved[1][f"{family} relu"][0], tmp_path / "model")
    names = {"vit": "depth", "bert": "num_hidden_layers", "gpt2": "n_layer"}

    def fewer(config):
        config.get("model_args", config)[names[family]] = 2
        return config

    damage_config(fewer)(tmp_path / "model")
    with pytest.raises(ValueError, match=r"does not fit its config|config\.json has no place for"):
        formix.load(tmp_path / "model")


def test_a_directory_with_num_classes_among_its_arguments_loads(saved, tmp_path):
    """As formix wrote them before transformers' Auto classes were to load them."""
    directory, expected = saved[1]["vit relu"]
    shutil.copytree(directory, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "num_classes" not in config["model_args"]
    damage_config(lambda c: c | {"model_args": c["model_args"] | {"num_classes": 5}})(tmp_path / "model")
    assert torch.equal(logits(formix.load(tmp_path / "model"), "vit"), expected)


@pytest.mark.parametrize("content", ["", "junk" * 9, "cos\nsystem\n(S'touch {}'\ntR."])
def test_a_damaged_or_dangerous_pickle_of_weights_is_refused(content, tmp_path):
    """transformers' older format; the last would make a file if it were unpickled."""
    hf.BertModel(hf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content.format(tmp_path / "made").encode())
    with pytest.raises(ValueError, match=r"The weights in .* cannot be read \("):
        formix.create_model(tmp_path, "relu")
    assert not (tmp_path / "made").exists()


def test_what_is_no_directory_of_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        formix.load(tmp_path)
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        formix.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is no directory with a config\.json"):
        formix.create_model(tmp_path)
    with pytest.raises(ValueError, match=r"is no directory with a config\.json"):
        formix.create_model("no/such/place", "relu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="a directory brings its own"):
        formix.create_model(tmp_path, pretrained=True)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("bert", "did you mean bert-tiny or"), ("vit_smal_patch16_224", "did you mean vit_small_patch16_224"),
     ("sima_smal_12_p16", "did you mean sima_small_12_p16"), ("xyzzy", "text models are gpt2-nano,")],
)  # fmt: skip
def test_names_of_no_model(name, advice):
    with pytest.raises(ValueError, match=f"'{name}' is no model that formix knows; {advice}"):
        formix.create_model(name, "relu")


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="A Linear is no model of formix's"):
        formix.save(torch.nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(ValueError, match="is no model of formix's"):
        formix.save(timm.create_model("vit_tiny_patch16_224", **VIT), tmp_path / "b")
    own_layer = make("vit", "relu", act_layer=torch.nn.ReLU)
    with pytest.raises(ValueError, match="act_layer"):
        formix.save(own_layer, tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file"):
        formix.save(make("vit"), tmp_path / "file")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "file"], "nothing half written"


CHANGES = {
    "pruned": lambda model: model.prune_intermediate_layers([0, 1]),
    "patch size": lambda model: model.set_input_size(patch_size=(8, 8)),
    "head": lambda model: setattr(model, "head", torch.nn.Linear(48, 9)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_its_config_does_not_describe_is_not_saved(change, tmp_path):
    model = make("vit")
    CHANGES[change](model)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="changed after it was made"):
        formix.save(model, tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert not (tmp_path / "model").exists()


def test_a_failed_save_leaves_the_older_model(tmp_path, monkeypatch):
    formix.save(make("vit", "relu"), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(model, path, **kwargs):
        Path(path).write_bytes(b"cut")
        raise OSError("No space left on device")

    monkeypatch.setattr("formix.models.directory.save_model", fail)
    with pytest.raises(OSError, match="No space left"):
        formix.save(make("vit", "sima"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_failed_save_of_a_text_model_leaves_the_older_one(tmp_path, monkeypatch):
    model = make("bert", "relu")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(before) > 3
    save = type(model).save_pretrained

    def fail(self, directory):
        save(self, directory)
        (directory / "model.safetensors").write_bytes(b"cut")
        raise OSError("No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        formix.save(make("bert", "sima"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.undo()
    other = make("bert", "sima")
    formix.save(other, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert torch.equal(logits(formix.load(tmp_path), "bert"), logits(other, "bert"))
