"""GPT-2 with every design that can be causal; the others are refused with the reason."""

import pytest
import torch
from oracles import close

import formix
from formix.design import GatedUnit, Sima, Softmax

GPT2 = {"n_layer": 3, "n_embd": 48, "n_head": 3, "vocab_size": 50, "n_positions": 32}
DESIGNS = [*formix.list_designs(), "relu+paf+skip", "relu(gate=silu,qk_norm=true)+skip"]
CAUSAL = [d for d in DESIGNS if not formix.design(d).causal_refusal(3)]
REFUSED = [d for d in DESIGNS if d not in CAUSAL]


def make(design, **more):
    return formix.create_model("gpt2-nano", design, **(GPT2 | more)).eval()


def tokens(*shape):
    return torch.randint(0, 50, shape)


def test_both_kinds_are_there():
    assert {"softmax", "relu", "paf", "parallel", "skip"} <= set(CAUSAL)
    assert {"sima", "activator", "activator-glu"} <= set(REFUSED)


@pytest.mark.parametrize("design", REFUSED)
def test_designs_that_cannot_be_causal_are_refused(design):
    with pytest.raises(ValueError, match=r"cannot be causal|mixes no tokens") as refusal:
        make(design)
    assert str(refusal.value) == formix.design(design).causal_refusal(3)


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification", "token-classification", "features"])
def test_refused_for_every_task(task):
    with pytest.raises(ValueError, match="cannot be causal"):
        make("sima", task=task)


def test_hybrids():
    with pytest.raises(ValueError, match="cannot be causal"):
        make(formix.design("softmax", layers={1: Sima()}))
    mixed = make(formix.design("activator", layers={1: Softmax()}))
    assert mixed(tokens(2, 9)).logits.shape == (2, 9, 50)
    assert make(formix.design("relu", layers={0: GatedUnit()}))(tokens(2, 9)).logits.isfinite().all()


@pytest.mark.parametrize("design", CAUSAL)
def test_no_token_sees_a_later_one(design):
    model, ids = make(design), tokens(2, 9)
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 50
    with torch.no_grad():
        a, b = model(ids).logits, model(other).logits
    close(a[:, :5], b[:, :5], 1e-6)
    assert not torch.allclose(a[:, 5:], b[:, 5:])


@pytest.mark.parametrize("design", CAUSAL)
def test_a_step_with_the_cache_is_a_column_of_the_whole(design):
    model, ids = make(design), tokens(2, 9)
    with torch.no_grad():
        whole = model(ids).logits
        past, columns = None, []
        for piece in ids.split([4, 1, 3, 1], dim=1):
            out = model(piece, past_key_values=past, use_cache=True)
            past = out.past_key_values
            columns.append(out.logits)
    close(torch.cat(columns, 1), whole, 1e-5)


@pytest.mark.parametrize("design", CAUSAL)
def test_checkpointing_gives_equal_gradients(design):
    model, ids = make(design).train(), tokens(2, 9)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model(ids, labels=ids).loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    assert {n for n, g in expected.items() if g is None or not g.isfinite().all()} == set()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        close(p.grad, expected[name], 1e-5, f"gradient of {name}", floor=0.1)


def test_unknown_fields_tasks_and_designs():
    with pytest.raises(ValueError, match="'layers': no field of FormixGPT2Config"):
        make("relu", layers=3)
    with pytest.raises(ValueError, match="task is 'masked-lm'; gpt2 models do"):
        make("relu", task="masked-lm")
    with pytest.raises(ValueError, match="'rellu' is no design"):
        make("rellu")
    with pytest.raises(ValueError, match="num_attention_heads is 5"):
        make("relu", n_head=5)
    with pytest.raises(ValueError, match="pretrained=True is for timm's names"):
        formix.create_model("gpt2", "relu", pretrained=True)


@pytest.mark.parametrize("task", ["causal-lm", "features"])
def test_the_last_weights_of_both_branches_begin_smaller(task):
    """N(0, 0.02 / sqrt(2 layers)), as GPT-2's; all others N(0, 0.02)."""
    model = formix.create_model("gpt2-nano", "relu+skip", task=task, n_layer=8, n_embd=256)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            scale = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert weight.detach().std().item() == pytest.approx(scale, rel=0.03), name
