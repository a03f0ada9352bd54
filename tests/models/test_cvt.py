"""CvT in any design with keys: transformers' own with softmax, a straight-line formula with SimA and ReLU."""

import pytest
import straight as s
import torch
from oracles import H, close
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, CvtConfig, CvtForImageClassification

import formix
from formix.benchmarks import count_flops

SMALL = {"depth": [1, 2, 3], "embed_dim": [16, 48, 96], "drop_path_rate": [0.0, 0.0, 0.0], "num_labels": 5}
HEADS = (1, 3, 6)


def small(design="softmax", **config):
    return formix.create_model("cvt-13", design=design, **SMALL, **config).double().eval()


def random_weights(model) -> s.State:
    return s.random_state({k: tuple(v.shape) for k, v in model.state_dict().items()})


def straight_cvt(state: s.State, images: torch.Tensor, mix, heads=HEADS) -> torch.Tensor:
    """CvT's equations in evaluation mode; `mix(q, k, v, C)` is the operator on [B, H, N, D]."""
    x = images
    for stage, depth in enumerate(SMALL["depth"]):
        p = f"cvt.encoder.stages.{stage}"
        embedding = f"{p}.embedding.convolution_embeddings"
        stride, padding = ((4, 2), (2, 1), (2, 1))[stage]
        x = s.conv(state, f"{embedding}.projection", x, stride=stride, padding=padding)
        b, c, h, w = x.shape
        x = s.norm(state, f"{embedding}.normalization", x.flatten(2).mT, 1e-5)
        token = state[f"{p}.cls_token"].expand(b, -1, -1) if stage == 2 else x[:, :0]
        x = torch.cat([token, x], dim=1)
        for i in range(depth):
            a = f"{p}.layers.{i}.attention.attention"
            y = s.norm(state, f"{p}.layers.{i}.layernorm_before", x, 1e-5)
            grid = y[:, token.shape[1] :].mT.reshape(b, c, h, w)
            parts = []
            for name, stride in (("query", 1), ("key", 2), ("value", 2)):
                convolved = f"{a}.convolution_projection_{name}.convolution_projection"
                z = s.conv(state, f"{convolved}.convolution", grid, stride=stride, padding=1, groups=c)
                z = s.batch_norm(state, f"{convolved}.normalization", z, False).flatten(2).mT
                z = s.linear(state, f"{a}.projection_{name}", torch.cat([y[:, : token.shape[1]], z], dim=1))
                parts.append(s.split_heads(z, heads[stage]))
            mixed = s.merge_heads(mix(*parts, c))
            x = x + s.linear(state, f"{p}.layers.{i}.attention.output.dense", mixed)
            y = s.norm(state, f"{p}.layers.{i}.layernorm_after", x, 1e-5)
            y = s.gelu(s.linear(state, f"{p}.layers.{i}.intermediate.dense", y))
            x = x + s.linear(state, f"{p}.layers.{i}.output.dense", y)
        token, x = x[:, : token.shape[1]], x[:, token.shape[1] :].mT.reshape(b, c, h, w)
    return s.linear(state, "classifier", s.norm(state, "layernorm", token, 1e-5).mean(1))


@pytest.mark.parametrize("name", ["cvt-13", "cvt-21"])
def test_softmax_is_transformers_cvt(name):
    depth = {"cvt-13": [1, 2, 10], "cvt-21": [1, 4, 16]}[name]
    theirs = CvtForImageClassification(CvtConfig(depth=depth)).eval()
    ours = formix.create_model(name, num_classes=2).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(ours(images).logits, theirs(images).logits, 1e-5)


def test_softmax_is_transformers_cvt_in_float64_with_gradients():
    model = small()
    state = random_weights(model)
    theirs = CvtForImageClassification(CvtConfig(**SMALL)).double().eval()
    theirs.load_state_dict(state, strict=True)
    model.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    actual, expected = model(images).logits, theirs(images).logits
    close(actual, expected, 1e-10)
    actual.sum().backward()
    expected.sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        close(a.grad, b.grad, 1e-10, f"gradient of {name}")


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("design", ["sima", "sima(num_heads=1)", "relu", "softmax"])
def test_logits_and_gradients_by_formula(design, size):
    """Query and key lengths differ; SimA's norms run over each by itself, without CvT's scale C^-1/2."""

    def mix(q, k, v, c):
        if design.startswith("sima"):
            return s.l1(q, 1e-12) @ (s.l1(k, 1e-12).mT @ v)
        scores = q @ k.mT * c**-0.5
        return (scores.softmax(-1) if design == "softmax" else H["relu"](scores) / k.shape[2]) @ v

    heads = (1, 1, 1) if "num_heads" in design else HEADS
    model = small(design)
    state = random_weights(model)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    s.compare(model, lambda w, x: straight_cvt(w, x, mix, heads), state, images, logits=lambda out: out.logits)


@pytest.mark.parametrize("design", ["sima", "relu(qk_norm=true,gate=silu)+parallel", "softmax(gate=sigmoid)"])
def test_save_load_and_auto_classes(design, tmp_path):
    model = formix.create_model("cvt-13", design=design, **SMALL).eval()
    formix.save(model, tmp_path)
    images = torch.randn(1, 3, 48, 48)
    expected = model(images).logits
    for loaded in (formix.load(tmp_path), AutoModelForImageClassification.from_pretrained(tmp_path).eval()):
        close(loaded(images).logits, expected, 1e-6)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
        assert loaded.config.design == model.config.design
    trunk = AutoModel.from_pretrained(tmp_path).eval()
    close(trunk(images).last_hidden_state, model.cvt(images).last_hidden_state, 1e-6)


def test_a_transformers_directory_becomes_a_design(tmp_path):
    theirs = CvtForImageClassification(CvtConfig(**SMALL)).eval()
    theirs.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    close(formix.create_model(tmp_path).eval()(images).logits, theirs(images).logits, 1e-5)
    sima = formix.create_model(tmp_path, design="sima")
    assert torch.equal(sima.cvt.encoder.stages[0].layers[0].attention.output.dense.weight,
                       theirs.cvt.encoder.stages[0].layers[0].attention.output.dense.weight)  # fmt: skip
    with pytest.raises(ValueError, match="no weights for"):
        formix.create_model(tmp_path, design="relu(qk_norm=true)")
    with pytest.raises(ValueError, match="without a design"):
        formix.load(tmp_path)
    other = formix.create_model(tmp_path, "sima", num_classes=9).eval()
    assert other(images).logits.shape == (1, 9)
    assert torch.equal(other.cvt.encoder.stages[2].cls_token, theirs.cvt.encoder.stages[2].cls_token)
    with pytest.raises(ValueError, match="weights of another shape for 1 parameters"):
        formix.create_model(tmp_path, "sima", in_chans=1)
    with pytest.raises(ValueError, match="'layers': no field"):
        formix.create_model(tmp_path, "sima", layers=3)


@pytest.mark.parametrize("lost", ["classifier.weight", "cvt.encoder.stages.2.cls_token", "layernorm.bias"])
def test_a_directory_without_a_weight_is_refused(lost, tmp_path):
    formix.save(formix.create_model("cvt-13", design="relu", **SMALL), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"no weights for 1 parameters of this design .{lost}"):
        formix.load(tmp_path)


def test_transformers_expectations():
    model = formix.create_model("cvt-13", design="sima", **SMALL).train()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    out = model(images, labels=labels, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    out.loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(images, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, plain[name], 1e-4, name)
    assert model.bfloat16()(images.bfloat16()).logits.isfinite().all()
    last_relu = formix.design("sima", layers={-1: formix.design("relu").mixer})
    hybrid = formix.create_model("cvt-13", design=last_relu, **SMALL)
    kinds = [layer.attention.attention.mixer.kind for stage in hybrid.cvt.encoder.stages for layer in stage.layers]
    assert kinds == ["sima"] * 5 + ["pointwise"]


def test_operations_and_refusals():
    images = torch.empty(1, 3, 224, 224)
    counts = {d: count_flops(formix.create_model("cvt-13", design=d, **SMALL), images) for d in ("softmax", "sima")}
    tokens = [(56**2, 28**2, 16, 16, 1), (28**2, 14**2, 48, 16, 2), (14**2 + 1, 7**2 + 1, 96, 16, 3)]
    quadratic = sum(4 * n * m * c * layers for n, m, c, d, layers in tokens)
    linear = sum(min(4 * n * m * c, 2 * (n + m) * c * d) * layers for n, m, c, d, layers in tokens)
    assert counts["softmax"] - counts["sima"] == quadratic - linear
    for design, words in (("activator", "gated unit"), ("skip", "different widths"), ("sima(num_heads=5)", "divide")):
        with pytest.raises(ValueError, match=words):
            formix.create_model("cvt-13", design=design)
    with pytest.raises(ValueError, match="no field"):
        formix.create_model("cvt-13", depths=[1, 1, 1])
    with pytest.raises(ValueError, match="no CvT"):
        formix.create_model("cvt-14")
