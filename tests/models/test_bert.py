"""BERT with every design."""

import contextlib
import json

import pytest
import torch
from oracles import close
from transformers import BertConfig, BertForMaskedLM

import formix
from formix.design import Softmax

BERT = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96, "vocab_size": 50,
    "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
DESIGNS = [*formix.list_designs(), "relu+paf+skip", "sima+parallel", "relu(gate=silu,qk_norm=true)"]
POOLED = ["sequence-classification", "multiple-choice"]


def make(design, **more):
    return formix.create_model("bert-tiny", design, **(BERT | more)).eval()


def tokens(*shape):
    return torch.randint(1, 50, shape)


def test_softmax_is_transformers_model():
    theirs = BertForMaskedLM(BertConfig(**BERT)).eval()
    model = make("softmax")
    model.load_state_dict(theirs.state_dict(), strict=True)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        close(model(ids).logits, theirs(ids).logits, 1e-6)
        got, want = model(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
    close(got[mask.bool()], want[mask.bool()], 1e-6)


@pytest.mark.parametrize("design", DESIGNS)
def test_padding_is_that_of_the_unpadded_input(design):
    model, ids = make(design), tokens(2, 6)
    padded = torch.cat([ids, tokens(2, 3)], 1)
    mask = (torch.arange(9) < 6).long().expand(2, 9)
    with torch.no_grad():
        close(model(padded, attention_mask=mask).logits[:, :6], model(ids).logits, 1e-5)


@pytest.mark.parametrize("design", DESIGNS)
def test_every_parameter_of_the_blocks_gets_a_gradient(design):
    model, ids = make(design).train(), tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    layers = {n: p.grad for n, p in model.named_parameters() if ".layer." in n}
    assert {n for n, g in layers.items() if g is None or not g.isfinite().all()} == set()


@pytest.mark.parametrize("task", POOLED)
@pytest.mark.parametrize("design", ["activator", "activator-glu"])
def test_a_pooled_head_needs_a_mixer(design, task):
    with pytest.raises(ValueError, match="reads the first token alone"):
        make(design, task=task)
    make(formix.design(design, layers={1: Softmax()}), task=task)


def test_the_official_unit_has_no_dropout():
    for official in (True, False):
        layer = make(formix.design("activator", official=official), hidden_dropout_prob=0.5).bert.encoder.layer[0]
        x = torch.randn(2, 5, layer.attention.unit.fc1.in_features, dtype=layer.attention.unit.fc1.weight.dtype)
        unit = layer.attention.unit.train()
        assert torch.equal(unit(x), unit(x)) is official


def test_unknown_fields_tasks_and_designs():
    with pytest.raises(ValueError, match="'n_layer': no field of FormixBertConfig"):
        make("relu", n_layer=3)
    with pytest.raises(ValueError, match="task is 'causal-lm'; bert models do"):
        make("relu", task="causal-lm")
    with pytest.raises(ValueError, match="'rellu' is no design"):
        make("rellu")
    with pytest.raises(ValueError, match=r"must divide hidden_size|multiple of the number of attention"):
        make("relu", num_attention_heads=5)
    with pytest.raises(ValueError, match="is_decoder"):
        make("relu", is_decoder=True)


def test_relative_positions_of_older_checkpoints_are_refused(tmp_path):
    """transformers no longer knows them and reads such a directory as one with absolute positions."""
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for kind in ("absolute", "relative_key"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"position_embedding_type": kind}))
        with contextlib.nullcontext() if kind == "absolute" else pytest.raises(ValueError, match="'relative_key'"):
            formix.create_model(tmp_path, "paf")
