"""Skip-layer attention in GPT-2: keys, a per-head loop in float64, source maps, and pruning of unread heads."""

from __future__ import annotations

import math

import pytest
import torch
from text_families import SMALL, small, tokens
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import formix
from formix.design import Sima, Softmax
from formix.models.kv_heads import KeyValueHeads, live_heads, prune_kv_heads

SIZES = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("design", ["softmax", "relu+skip"])
def test_every_size_has_gpt2s_parameters(name: str, design: str) -> None:
    with torch.device("meta"):
        model = formix.create_model(name, design=design)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]  # the tied output projection counted once


def test_keys_and_shapes_are_those_of_gpt2() -> None:
    expected = {
        "transformer.wte.weight": (60, 32),
        "transformer.wpe.weight": (64, 32),
        "transformer.ln_f.weight": (32,),
        "transformer.ln_f.bias": (32,),
        "lm_head.weight": (60, 32),
    }
    for i in range(4):
        h = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            expected |= {f"{h}{norm}.weight": (32,), f"{h}{norm}.bias": (32,)}
        for name, rows, columns in (
            ("attn.c_attn", 32, 96),
            ("attn.c_proj", 32, 32),
            ("mlp.c_fc", 32, 128),
            ("mlp.c_proj", 128, 32),
        ):
            expected |= {f"{h}{name}.weight": (rows, columns), f"{h}{name}.bias": (columns,)}
    model = small("gpt2", "skip(source=distance(2),heads=2)")
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected


def test_softmax_is_transformers_gpt2() -> None:
    torch.manual_seed(0)
    config = {**SMALL["gpt2"][1], "bos_token_id": None, "eos_token_id": None}
    theirs = GPT2LMHeadModel(GPT2Config(**config, initializer_range=0.2)).eval()
    ours = small("gpt2")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids = tokens(2, 11)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------- the model once more, straight-line


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + b


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gpt2(p: dict[str, Tensor], ids: Tensor, weights, skip: list[tuple[int | None, set[int]]], layout: str) -> Tensor:
    """Logits [N, V] of one sequence, one head and one query at a time: K~_{l,i} = K_{s(l),i} if i in S_l."""
    heads, n = 4, len(ids)
    x = p["transformer.wte.weight"][ids] + p["transformer.wpe.weight"][:n]
    c = x.shape[1]
    d = c // heads
    projected: list[Tensor] = []  # [N, 3 C] of every layer: queries, keys, values
    for i, (source, skip_heads) in enumerate(skip):
        w = {k.removeprefix(f"transformer.h.{i}."): v for k, v in p.items() if k.startswith(f"transformer.h.{i}.")}

        def norm(y: Tensor, name: str, w=w) -> Tensor:
            return layer_norm(y, w[f"{name}.weight"], w[f"{name}.bias"])

        def ffn(y: Tensor, w=w) -> Tensor:
            hidden = gelu_tanh(y @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"])
            return hidden @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]

        h = x if layout == "paf" else norm(x, "ln_1")
        projected.append(h @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"])
        out = torch.zeros_like(x)
        for j in range(heads):
            layer = source if j in skip_heads else i
            q = projected[i][:, j * d : (j + 1) * d]
            k = projected[layer][:, c + j * d : c + (j + 1) * d]
            v = projected[layer][:, 2 * c + j * d : 2 * c + (j + 1) * d]
            mixed = torch.stack([weights(q[t] @ k[: t + 1].T / math.sqrt(d)) @ v[: t + 1] for t in range(n)])
            out = out + mixed @ w["attn.c_proj.weight"][j * d : (j + 1) * d]
        out = out + w["attn.c_proj.bias"]
        if layout == "series":
            x = x + out
            x = x + ffn(norm(x, "ln_2"))
        elif layout == "parallel":
            x = x + out + ffn(h)
        else:
            x = norm(x + out + ffn(x), "ln_2")
    x = layer_norm(x, p["transformer.ln_f.weight"], p["transformer.ln_f.bias"])
    return x @ p["transformer.wte.weight"].T


def softmax(s: Tensor) -> Tensor:
    return torch.softmax(s, -1)


def relu(s: Tensor) -> Tensor:
    return s.clamp(min=0) / len(s)


THREE, ALL = {0, 1, 2}, {0, 1, 2, 3}
NONE: tuple[None, set[int]] = (None, set())


@pytest.mark.parametrize(
    ("design", "weights", "skip", "layout"),
    [
        ("softmax", softmax, [NONE] * 4, "series"),
        ("skip", softmax, [NONE, (0, THREE), (1, THREE), (2, THREE)], "series"),
        ("skip(heads=0)", softmax, [NONE] * 4, "series"),
        ("skip(heads=4)", softmax, [NONE, (0, ALL), (1, ALL), (2, ALL)], "series"),
        ("skip(source=distance(3),heads=1)", softmax, [NONE, NONE, NONE, (0, {0})], "series"),
        ("skip(source=last(2,1),heads=[1,3])", softmax, [NONE, NONE, (1, {1, 3}), (2, {1, 3})], "series"),
        ("skip(source=0_0_2_2,heads=0.5)", softmax, [NONE, (0, {0, 1}), NONE, (2, {0, 1})], "series"),
        ("relu+skip(source=fixed(1),heads=[2])", relu, [NONE, NONE, (1, {2}), (1, {2})], "series"),
        ("relu+parallel+skip", relu, [NONE, (0, THREE), (1, THREE), (2, THREE)], "parallel"),
        ("paf+skip", softmax, [NONE, (0, THREE), (1, THREE), (2, THREE)], "paf"),
    ],
)
def test_logits_and_gradients_equal_a_loop_over_heads(design: str, weights, skip, layout: str) -> None:
    model = small("gpt2", design).double()
    ids = tokens(1, 9)
    given = model(ids).logits[0]
    parameters = dict(model.named_parameters())
    expected = gpt2(parameters, ids[0], weights, skip, layout)
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)

    direction = torch.randn(given.shape, dtype=given.dtype, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((given * direction).sum(), list(parameters.values()))
    theirs = torch.autograd.grad((expected * direction).sum(), list(parameters.values()))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_heads_per_layer() -> None:
    model = small("gpt2", formix.design("skip", source=(None, 0, 0, 1), heads=((), (0,), (1, 2), (3,)))).double()
    ids = tokens(1, 9)
    expected = gpt2(dict(model.named_parameters()), ids[0], softmax, [NONE, (0, {0}), (0, {1, 2}), (1, {3})], "series")
    torch.testing.assert_close(model(ids).logits[0], expected, rtol=1e-10, atol=1e-10)


def test_no_skip_heads_is_bit_identical_to_softmax() -> None:
    plain, none = small("gpt2"), small("gpt2", "skip(heads=0)")
    none.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(plain(tokens(2, 12)).logits, none(tokens(2, 12)).logits)


def test_which_heads_is_a_matter_of_order() -> None:
    """Swapping heads 0 and 3 in all weights turns wiring of head 0 into wiring of head 3."""
    first, last = small("gpt2", "skip(heads=[0])").double(), small("gpt2", "skip(heads=[3])").double()
    order = torch.tensor([3, 1, 2, 0])
    state = first.state_dict()
    for name, weight in state.items():
        if "c_attn" in name:
            state[name] = weight.unflatten(-1, (3, 4, 8))[..., order, :].flatten(-3)
        elif "attn.c_proj.weight" in name:
            state[name] = weight.unflatten(0, (4, 8))[order].flatten(0, 1)
    last.load_state_dict(state)
    torch.testing.assert_close(first(tokens(1, 8)).logits, last(tokens(1, 8)).logits, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------------------------ pruning


def test_the_heads_that_nobody_reads() -> None:
    def live(design: str) -> list[tuple[int, ...]]:
        chosen = formix.design(design)
        return [live_heads(chosen.layer(i, 4), i, 4) for i in range(4)]

    assert live("softmax") == [(0, 1, 2, 3)] * 4
    assert live("skip") == [(0, 1, 2, 3)] * 3 + [(3,)]  # each layer is the next one's source, the last is nobody's
    assert live("skip(source=fixed(0),heads=[1,2])") == [(0, 1, 2, 3)] + [(0, 3)] * 3
    assert live("skip(source=fixed(0),heads=4)") == [(0, 1, 2, 3), (), (), ()]
    assert live("skip(source=0_0_2_2,heads=2)") == [(0, 1, 2, 3), (2, 3), (0, 1, 2, 3), (2, 3)]
    # layer 1 gives head 3 alone to layer 2; its own heads 0 and 1, overridden, are dead
    per_layer = formix.design("skip", source=(None, 0, 1, None), heads=((), (0, 1), (3,), ()))
    layers = [per_layer.layer(i, 4) for i in range(4)]
    assert live_heads(layers[1], 1, 4) == (2, 3)
    assert KeyValueHeads.of(layers[2], 4, pruned=True).runs == ((False, 0, 3), (True, 1, 2))


WIRINGS = (
    "skip",
    "skip(source=fixed(0),heads=1.0)",
    "skip(source=0_0_2_2,heads=[1])",
    "relu+paf+skip(source=fixed(1))",
)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("design", WIRINGS)
def test_pruned_logits_are_equal_saved_and_loaded(family: str, design: str, tmp_path) -> None:
    model, ids = small(family, design), tokens(2, 9)
    before, parameters = model(ids).logits, sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as full:
        model(ids)
    removed = prune_kv_heads(model)
    assert removed > 0
    assert sum(p.numel() for p in model.parameters()) == parameters - removed
    with FlopCounterMode(display=False) as fewer:
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    weights = removed if family == "llama" else removed * 32 // 33  # the others have a bias for 32 inputs
    assert full.get_total_flops() - fewer.get_total_flops() == 2 * ids.numel() * weights

    formix.save(model, tmp_path)
    loaded = formix.load(tmp_path)
    assert loaded.config.pruned_kv
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    torch.testing.assert_close(loaded(ids).logits, after, rtol=1e-6, atol=1e-6)
    assert prune_kv_heads(loaded) == 0
    with pytest.raises(ValueError, match="pruned"):
        formix.create_model(tmp_path, design="softmax")


def test_pruning_keeps_the_gradients_of_what_is_left() -> None:
    model, ids = small("gpt2", "skip").double(), tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    before = {k: p.grad for k, p in model.named_parameters() if "c_attn" not in k}
    model.zero_grad()
    prune_kv_heads(model)
    model(ids, labels=ids).loss.backward()
    for name, gradient in before.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-10, atol=1e-12)


def test_nothing_to_prune_changes_nothing() -> None:
    model = small("gpt2", "relu")
    assert prune_kv_heads(model) == 0
    assert not model.config.pruned_kv
    with pytest.raises(ValueError, match="no key/value heads"):
        prune_kv_heads(torch.nn.Linear(2, 2))
    adapted = small("llama", "skip")
    adapted.model.layers[3].self_attn.k_proj = torch.nn.Sequential(adapted.model.layers[3].self_attn.k_proj)
    with pytest.raises(ValueError, match="adapters"):
        prune_kv_heads(adapted)


def test_layers_of_different_heads_cannot_share_them() -> None:
    with pytest.raises(ValueError, match="same number of heads"):
        small("bert", formix.design("skip", layers={1: Sima(num_heads=1)}))
    one_head = small("bert", formix.design("sima+skip", num_heads=1, heads=1))
    mixed = formix.design("sima+skip", num_heads=4, heads=2, layers={0: Softmax()})
    for model in (one_head, small("bert", mixed)):
        assert model(tokens(1, 6)).logits.isfinite().all()
