"""Designs: names, combinations, options, hybrids, wiring, and JSON both ways."""

import copy
import dataclasses
import itertools
import json
import pickle

import hypothesis.strategies as st
import pytest
from hypothesis import given

import formix
from formix.design import (
    MIXERS,
    Design,
    GatedUnit,
    LayerDesign,
    Layout,
    Pointwise,
    Sima,
    Softmax,
    Wiring,
    design,
    list_designs,
)

NAMES = list(list_designs())
PARTS = ("mixer", "layout", "wiring")


def chosen_parts(name):
    """The parts that a name chooses: those that differ from the default; "softmax" names the default mixer."""
    differing = {p for p in PARTS if getattr(design(name), p) != getattr(Design(), p)}
    return differing or {"mixer"}


PAIRS = list(itertools.combinations(NAMES, 2))


def test_public_names():
    assert formix.design is design
    assert formix.list_designs is list_designs
    assert {"softmax", "relu", "sima", "activator", "activator-glu", "paf", "skip"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_named(name):
    line = list_designs()[name]
    assert line
    assert "\n" not in line
    found = design(name)
    assert isinstance(found, Design)
    assert found.describe()
    assert "\n" not in found.describe()
    assert design(found) == design(found.to_dict()) == design(f" {name} ") == found
    assert [found.layer(i, 4).index for i in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", NAMES)
def test_json_both_ways(name):
    check_json(design(name))


def check_json(found):
    text = found.to_json()
    again = Design.from_json(text)
    assert again == found
    assert hash(again) == hash(found)
    assert again.to_json() == text
    assert Design.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert pickle.loads(pickle.dumps(found)) == copy.deepcopy(found) == found


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["+".join(p) for p in PAIRS])
def test_pairs(first, second):
    """Names that choose different parts combine, in either order; the others say which part both choose."""
    shared = chosen_parts(first) & chosen_parts(second)
    both = f"{first}+{second}"
    if shared:
        with pytest.raises(ValueError, match=f"{first!r} and {second!r} both choose the ({'|'.join(shared)})"):
            design(both)
        return
    mixer = next((design(n).mixer for n in (first, second) if "mixer" in chosen_parts(n)), Softmax())
    if not mixer.has_keys and any("wiring" in chosen_parts(n) for n in (first, second)):
        with pytest.raises(ValueError, match=f"a {mixer.kind} mixer has none"):
            design(both)
        return
    combined = design(both)
    assert combined == design(f"{second}+{first}") == design(f" {first} + {second} ")
    for part in PARTS:
        owner = next((n for n in (first, second) if part in chosen_parts(n)), None)
        assert getattr(combined, part) == getattr(design(owner) if owner else Design(), part)
    check_json(combined)
    assert combined.describe() != Design().describe() or "softmax" in (first, second)


def test_three_parts():
    found = design("relu+paf+skip")
    assert found == Design(mixer=Pointwise(), layout=Layout(parallel=True, norm="post"), wiring=Wiring())
    check_json(found)


OPTIONS = {
    "relu(length_exponent=0.5)": Design(mixer=Pointwise(length_exponent=0.5)),
    "relu( activation = gelu , qk_norm = true )": Design(mixer=Pointwise(activation="gelu", qk_norm=True)),
    "relu(gate=silu,qk_norm=True)": Design(mixer=Pointwise(gate="silu", qk_norm=True)),
    "relu(length=196)": Design(mixer=Pointwise(length=196)),
    "relu(length=keys)": Design(mixer=Pointwise(length="keys")),
    "relu(length_exponent=5e-1)+paf": Design(
        mixer=Pointwise(length_exponent=0.5), layout=Layout(parallel=True, norm="post")
    ),
    "softmax(gate=sigmoid,norm=post)": Design(mixer=Softmax(gate="sigmoid"), layout=Layout(norm="post")),
    "sima(num_heads=1,eps=1e-6)": Design(mixer=Sima(num_heads=1, eps=1e-6)),
    "sima(num_heads=None)": Design(mixer=Sima()),
    "activator(ratio=4,inner_norm=true,official=true)": Design(
        mixer=GatedUnit(ratio=4.0, inner_norm=True), official=True
    ),
    "paf(norm=pre)": Design(layout=Layout(parallel=True, norm="pre")),
    "skip(source=distance(2))": Design(wiring=Wiring(source="distance(2)")),
    "skip(source=last(3,2),heads=0.5)": Design(wiring=Wiring(source="last(3,2)", heads=0.5)),
    "skip(heads=[0,2],source=fixed(1))": Design(wiring=Wiring(source="fixed(1)", heads=(0, 2))),
    "skip(heads=[[0],[],[1,2]])": Design(wiring=Wiring(heads=((0,), (), (1, 2)))),
    "skip(source=0_1_0_2)+relu(activation=relu6)": Design(
        mixer=Pointwise(activation="relu6"), wiring=Wiring(source="0_1_0_2")
    ),
    "skip(source=[null,0,null,1])": Design(wiring=Wiring(source=(None, 0, None, 1))),
}


@pytest.mark.parametrize("text", OPTIONS)
def test_options_in_parentheses(text):
    assert design(text) == OPTIONS[text]
    check_json(OPTIONS[text])


def test_options_by_keyword():
    assert design("relu", length_exponent=0.5) == OPTIONS["relu(length_exponent=0.5)"]
    assert design("relu(length_exponent=2)", length_exponent=0.5) == OPTIONS["relu(length_exponent=0.5)"]
    assert design("skip", heads=[0, 2], source="fixed(1)") == OPTIONS["skip(heads=[0,2],source=fixed(1))"]
    assert design(design("relu"), norm="post").layout == Layout(norm="post")
    assert design(design("relu").to_dict(), qk_norm=True).mixer == Pointwise(qk_norm=True)
    assert design("activator", official=True).official


def test_equal_designs_hash_equal_and_different_ones_differ():
    assert Design(mixer=Pointwise(length_exponent=1)) == Design(mixer=Pointwise(length_exponent=1.0))
    assert hash(Design(mixer=Pointwise(length_exponent=1))) == hash(Design(mixer=Pointwise(length_exponent=1.0)))
    assert Design(wiring=Wiring(heads=1)) != Design(wiring=Wiring(heads=1.0))  # one head, and all heads
    assert Design(layers={0: Softmax(), 1: Sima()}) == Design(layers={1: Sima(), 0: Softmax()})
    assert Design() != "softmax"
    assert len({design(n) for n in NAMES} | {design(n) for n in NAMES}) == len(NAMES)


def test_a_design_does_not_change_after_it_is_made():
    layers = {0: Softmax()}
    found = Design(mixer=Sima(), layers=layers)
    before = hash(found)
    layers[1] = Softmax()
    assert hash(found) == before
    with pytest.raises(AttributeError):
        found.mixer = Softmax()


# ---------------------------------------------------------------------------------------------------------- hybrids


def test_single_layers_differ():
    found = design("relu+paf", layers={0: Softmax(), -1: Sima(), 2: Layout(ffn=False)})
    layers = [found.layer(i, 6) for i in range(6)]
    assert [layer.mixer.kind for layer in layers] == ["softmax", *["pointwise"] * 4, "sima"]
    assert [layer.layout.ffn for layer in layers] == [True, True, False, True, True, True]
    assert all(isinstance(layer, LayerDesign) for layer in layers)
    assert "0: softmax" in found.describe()
    parts = {0: Softmax(), -1: Layout(parallel=True, norm="post"), 1: Layout(ffn=False), 2: Layout()}
    described = design("relu+paf", layers=parts).describe()
    assert described.endswith(
        "layer 0: softmax(QKᵀ/√d) V; layer -1: parallel, post-norm; layer 1: no FFN; layer 2: series"
    )
    assert design("relu", layers={0: Sima(), 3: Sima()}).describe().startswith("L^-1 relu(QKᵀ/√d) V; layers 0, 3: Q̂")
    check_json(found)


def test_layers_that_do_not_exist_or_are_named_twice():
    found = Design(layers={5: Sima()})
    assert found.layer(5, 6).mixer == Sima()
    with pytest.raises(ValueError, match="layer 5; the model has layers 0 to 3"):
        found.layer(0, 4)
    with pytest.raises(ValueError, match="layer -5; the model has layers 0 to 3"):
        Design(layers={-5: Sima()}).layer(0, 4)
    twice = Design(layers={3: Sima(), -1: Pointwise()})
    assert twice.layer(3, 6).mixer == Sima()
    with pytest.raises(ValueError, match="names layer 3 twice"):
        twice.layer(3, 4)
    mixer_and_layout = Design(layers={3: Sima(), -1: Layout(ffn=False)}).layer(3, 4)
    assert mixer_and_layout.mixer == Sima()
    assert not mixer_and_layout.layout.ffn


def test_mixing_and_causality():
    assert design("softmax").mixes_tokens(4)
    assert not design("activator").mixes_tokens(4)
    assert design("activator", layers={2: Softmax()}).mixes_tokens(4)
    assert design("relu").causal_refusal(4) is None
    assert "see the future" in design("sima").causal_refusal(4)
    assert "see the future" in design("relu", layers={0: Sima()}).causal_refusal(4)
    assert "mixes no tokens" in design("activator").causal_refusal(4)
    assert design("activator", layers={2: Softmax()}).causal_refusal(4) is None


# ----------------------------------------------------------------------------------------------------------- wiring

SOURCES = {
    "distance(1)": [None, 0, 1, 2, 3, 4],
    "distance(3)": [None, None, None, 0, 1, 2],
    "distance( 5 )": [None, None, None, None, None, 0],
    "last(2)": [None, None, None, None, 3, 4],
    "last(3,2)": [None, None, None, 1, 2, 3],
    "last(6, 2)": [None, None, 0, 1, 2, 3],
    "fixed(0)": [None, 0, 0, 0, 0, 0],
    "fixed(4)": [None, None, None, None, None, 4],
    "0_1_0_2_0_3": [None, None, 0, 2, 0, 3],
    "0_0_1_1_4_5": [None, 0, 1, 1, None, None],
    (None, 0, None, 2, 2, None): [None, 0, None, 2, 2, None],
}


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_sources(source):
    wiring = Wiring(source=source)
    assert list(wiring.resolve(6)) == SOURCES[source]
    found = Design(wiring=wiring)
    assert [found.layer(i, 6).source for i in range(6)] == SOURCES[source]
    check_json(found)


def test_presets():
    assert Wiring.distance(3) == Wiring(source="distance(3)")
    assert Wiring.last(3, 2, heads=5) == Wiring(source="last(3,2)", heads=5)
    assert Wiring.last(3) == Wiring(source="last(3,1)")
    assert Wiring.fixed(2, heads=(0, 1)) == Wiring(source="fixed(2)", heads=(0, 1))
    assert Wiring.distance() == Wiring(), "the default"


WRONG_SOURCES = {
    "distance(0)": "distance must be 1 to 5",
    "distance(6)": "distance must be 1 to 5",
    "last(7,1)": "count must be 1 to 6",
    "last(0,1)": "count must be 1 to 6",
    "last(2,6)": "distance must be 1 to 5",
    "fixed(5)": "none comes after layer 5",
    "0_1_0": "names 3 layers, the model has 6",
    "0_1_3_0_0_0": "source of layer 2 is 3",
    (None, 1, 0, 0, 0, 0): None,
    (None, 0, 1): "names 3 layers, the model has 6",
    "2_1_2_3_4_5": "source of layer 0 is 2; it must be None, for no layer is earlier",
    (None, 2, 0, 0, 0, 0): "source of layer 1 is 2",
    (None, 0, -1, 0, 0, 0): "source of layer 2 is -1",
}


@pytest.mark.parametrize("source", WRONG_SOURCES, ids=str)
def test_sources_that_a_depth_cannot_have(source):
    with pytest.raises(ValueError, match=WRONG_SOURCES[source] or "source of layer 1 is 1"):
        Wiring(source=source).resolve(6)


@pytest.mark.parametrize(
    "source",
    ["", "distance", "distance()", "distance(-1)", "distance(1,2)", "fixed(0,1)", "next(1)", 3, ("a",), (True,)],
)
def test_sources_that_nobody_can_read(source):
    with pytest.raises(ValueError, match=r"source is .*must be 'distance"):
        Wiring(source=source)


HEADS = {
    "share": (0.75, 12, tuple(range(9))),
    "share_rounds_down": (0.75, 6, (0, 1, 2, 3)),
    "share_is_one_at_least": (0.1, 4, (0,)),
    "all": (1.0, 4, (0, 1, 2, 3)),
    "number": (3, 4, (0, 1, 2)),
    "none": (0, 4, ()),
    "named": ((3, 1), 4, (1, 3)),
    "no_names": ((), 4, ()),
    "per_layer": (((), (0,), (2, 1), ()), 4, (1, 2)),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads(case):
    heads, number, expected = HEADS[case]
    wiring = Wiring(heads=heads)
    assert wiring.skip_heads(2, number, 4) == expected
    assert Design(wiring=wiring).layer(2, 4).skip_heads(number) == expected
    assert Design(wiring=wiring).layer(0, 4).skip_heads(number) == (), "layer 0 has no source"
    check_json(Design(wiring=wiring))


@given(st.integers(1, 128).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))))
def test_a_share_of_k_out_of_n_is_k_heads(fraction):
    k, n = fraction
    assert Wiring(heads=k / n).skip_heads(1, n, 2) == tuple(range(k))


@pytest.mark.parametrize(
    ("heads", "sentence"),
    [
        (5, "heads is 5, but the model has 4"),
        ((4,), "different numbers from 0 to 3"),
        ((1, 1), "different numbers"),
        (((0,), (1,)), "names 2 layers, the model has 3"),
    ],
    ids=str,
)
def test_heads_that_a_model_cannot_have(heads, sentence):
    with pytest.raises(ValueError, match=sentence):
        Wiring(heads=heads).skip_heads(1, 4, 3)


@pytest.mark.parametrize(
    "heads", [0.0, 1.5, -1, True, "3", None, float("nan"), ("a",), (-1,), ((0,), 1), (True,)], ids=str
)
def test_heads_that_nobody_can_read(heads):
    with pytest.raises(ValueError, match="heads is"):
        Wiring(heads=heads)


def test_wiring_and_layers_without_keys():
    """Only a layer that reads or is read needs keys."""
    unread = Design(wiring=Wiring(source="last(1,1)"), layers={0: GatedUnit()})
    assert [unread.layer(i, 4).mixer.kind for i in range(4)] == ["gated_unit", *["softmax"] * 3]
    for layer in (2, 3):
        found = Design(wiring=Wiring(source="last(1,1)"), layers={layer: GatedUnit()})
        with pytest.raises(ValueError, match=f"Layer {layer} has a gated_unit mixer, which has no keys"):
            found.layer(layer, 4)


# ---------------------------------------------------------------------------------------------------------- refused

REFUSED = {
    "unknown": ("sofmax", "'sofmax' is no design; known are softmax, relu"),
    "unknown_term": ("relu+fast", "'fast' is no design"),
    "empty": ("", "A design is a name such as 'relu\\+paf'"),
    "empty_term": ("relu+", "is no design"),
    "none": (None, "A design is a name"),
    "number": (3, "A design is a name"),
    "twice": ("relu+relu", "'relu' and 'relu' both choose the mixer"),
    "open_bracket": ("relu(length=3", "is no design"),
    "option_without_value": ("relu(gelu)", "'gelu' is no option; write option=value"),
    "unknown_option": ("relu(exponent=1)", "'exponent' is no option"),
    "option_of_another": ("sima(activation=relu)", "'activation' is no option"),
    "activation": ("relu(activation=softmax)", "activation is 'softmax'"),
    "glu_activation": ("activator(activation=relu6)", "activation is 'relu6'"),
    "gate": ("relu(gate=tanh)", "gate is 'tanh'"),
    "exponent": ("relu(length_exponent=-1)", "length_exponent is -1"),
    "exponent_nan": ("relu(length_exponent=NaN)", "length_exponent is nan"),
    "exponent_text": ("relu(length_exponent=half)", "length_exponent is 'half'"),
    "exponent_true": ("relu(length_exponent=true)", "length_exponent is True"),
    "sigmoid_bias": ("relu(activation=sigmoid_bias,length_exponent=0.5)", "length enters as the bias"),
    "length": ("relu(length=0)", "length is 0"),
    "length_half": ("relu(length=0.5)", "length is 0.5"),
    "flag": ("relu(qk_norm=no)", "qk_norm is 'no'; it must be true or false"),
    "flag_layout": ("paf(ffn=no)", "ffn is 'no'"),
    "flag_inner_norm": ("activator(inner_norm=1)", "inner_norm is 1"),
    "flag_official": ("paf(official=no)", "official is 'no'"),
    "norm": ("paf(norm=middle)", "norm is 'middle'"),
    "parallel_without_ffn": ("paf(ffn=false)", "nothing to be parallel to"),
    "heads_0": ("sima(num_heads=0)", "num_heads is 0"),
    "heads_true": ("sima(num_heads=true)", "num_heads is True"),
    "eps": ("sima(eps=0)", "eps is 0"),
    "eps_text": ("sima(eps=small)", "eps is 'small'"),
    "ratio": ("activator(ratio=-1)", "ratio is -1"),
    "ratio_text": ("activator(ratio=two)", "ratio is 'two'"),
    "no_keys": ("activator+skip", "a gated_unit mixer has none"),
    "layers": ("relu(layers=3)", "layers is 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    name, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence) as refusal:
        design(name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"mixer": "relu"},
        {"mixer": Layout()},
        {"layout": "parallel"},
        {"wiring": "distance(1)"},
        {"layers": {"0": Softmax()}},
        {"layers": {0: "softmax"}},
        {"layers": {True: Softmax()}},
        {"layers": [Softmax()]},
        {"official": "yes"},
    ],
    ids=str,
)
def test_parts_of_the_wrong_kind(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Design(**arguments)


DAMAGED = {
    "no_json": ("{", "not a design in JSON"),
    "list": ("[]", "A design is a mapping"),
    "text": ('"relu"', "A design is a mapping"),
    "field": ('{"mixer": {"kind": "softmax"}, "temperature": 2}', "'temperature' is no field of a design"),
    "mixer_kind": ('{"mixer": {"kind": "mamba"}}', "'kind' must be one of softmax, pointwise, sima, gated_unit"),
    "mixer_text": ('{"mixer": "relu"}', "is no mixer"),
    "mixer_field": ('{"mixer": {"kind": "sima", "power": 2}}', "'power' is no field of sima"),
    "mixer_value": ('{"mixer": {"kind": "sima", "eps": "x"}}', "eps is 'x'"),
    "mixer_list": ('{"mixer": {"kind": "pointwise", "activation": ["relu"]}}', "activation is"),
    "layout_field": ('{"layout": {"sandwich": true}}', "'sandwich' is no field of layout"),
    "layout_text": ('{"layout": "parallel"}', "layout is 'parallel'"),
    "wiring_field": ('{"wiring": {"mode": "concat"}}', "'mode' is no field of wiring"),
    "wiring_value": ('{"wiring": {"source": 3}}', "source is 3"),
    "official": ('{"official": "false"}', "official is 'false'"),
    "layers_list": ('{"layers": [1]}', "layers is"),
    "layers_null": ('{"layers": null}', "layers is None"),
    "layers_key": ('{"layers": {"first": {"kind": "softmax"}}}', "layers is"),
    "layers_part": ('{"layers": {"0": {"kind": "mamba"}}}', "'kind' must be one of"),
    "layers_layout": ('{"layers": {"0": {"kind": "layout", "norm": "mid"}}}', "norm is 'mid'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_json(case):
    text, sentence = DAMAGED[case]
    with pytest.raises(ValueError, match=sentence) as refusal:
        Design.from_json(text)
    assert "\n" not in str(refusal.value)


def test_a_design_of_an_empty_file_is_the_default():
    assert Design.from_json("{}") == Design() == design("softmax")


@pytest.mark.parametrize("kind", MIXERS)
def test_mixers(kind):
    mixer = MIXERS[kind]()
    assert mixer.kind == kind
    assert Design(mixer=mixer).to_dict()["mixer"]["kind"] == kind
    assert isinstance(mixer.has_keys, bool)


OTHER_OPTIONS = {
    "qk_norm": True, "gate": "silu", "activation": "sigmoid", "length_exponent": 0.5, "length": "keys", "num_heads": 1,
    "eps": 1e-6, "inner_norm": True, "ratio": 4.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "option"), [(kind, f.name) for kind, mixer in MIXERS.items() for f in dataclasses.fields(mixer)]
)
def test_formulas_show_every_option(kind, option):
    mixer = MIXERS[kind]
    assert mixer(**{option: OTHER_OPTIONS[option]}).formula != mixer().formula


@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        ("softmax", {"qk_norm": True}, "softmax(LN(Q)LN(K)ᵀ/√d) V"),
        ("relu", {"length": 196, "gate": "silu"}, "(196^-1 relu(QKᵀ/√d) V) ⊙ silu(xW)"),
        ("relu", {"length_exponent": 0, "activation": "relu2"}, "relu2(QKᵀ/√d) V"),
        ("relu", {"activation": "sigmoid_bias", "length": "keys"}, "sigmoid(QKᵀ/√d - log Nₖ) V"),
        ("activator", {"inner_norm": True}, "(LN(gelu(xW₁)) ⊙ LN(xW₂)) W₃"),
        ("activator-glu", {"ratio": 1}, "(gelu(xW₁) ⊙ xW₂) W₃, ratio=1; no FFN"),
        ("activator", {"official": True}, "(gelu(xW₁) ⊙ xW₂) W₃; as the official code"),
    ],
)
def test_formulas(name, options, formula):
    assert design(name, **options).describe() == formula


def test_single_layers_may_be_given_by_name_or_as_plain_data():
    expected = design("relu", layers={0: Softmax(), -1: Layout(parallel=True, norm="post")})
    assert design("relu", layers={0: "softmax", -1: "paf"}) == expected
    assert design('relu(layers={"0": "softmax", "-1": "paf"})') == expected
    assert design("relu", layers={"0": {"kind": "softmax"}, -1: design("paf")}) == expected
    assert design("softmax", layers={1: "relu(length_exponent=0.5)"}).layer(1, 2).mixer == Pointwise(
        length_exponent=0.5
    )


def test_a_single_layer_may_have_both_parts():
    layers = {0: (Softmax(), Layout()), 2: (Sima(), Layout(parallel=True, norm="post"))}
    found = design("relu+parallel", layers=layers)
    chosen = [found.layer(i, 4) for i in range(4)]
    assert [layer.mixer.kind for layer in chosen] == ["softmax", "pointwise", "sima", "pointwise"]
    assert [layer.layout for layer in chosen] == [Layout(), found.layout, layers[2][1], found.layout]
    described = found.describe()
    assert "; layer 0: softmax(QKᵀ/√d) V, series; layer 2: Q̂" in described
    assert described.endswith(", parallel, post-norm")
    assert design("relu+parallel", layers={0: layers[0], 2: "sima+paf"}) == found
    assert design("relu", layers={0: "softmax+paf"}).layers == {0: (Softmax(), layers[2][1])}
    check_json(found)
    with pytest.raises(ValueError, match="names layer 3 twice"):
        design("relu", layers={3: "sima+paf", -1: "parallel"}).layer(3, 4)


@pytest.mark.parametrize("part", ["skip", "softmax(official=true)"])
def test_a_single_layer_takes_a_mixer_and_a_layout_alone(part):
    with pytest.raises(ValueError, match="another layout or both, not more"):
        design("relu", layers={0: part})


@pytest.mark.parametrize("part", [(Softmax(),), (Layout(), Softmax()), [Softmax(), Layout()], (Softmax(), "paf")])
def test_a_pair_is_a_mixer_and_a_layout(part):
    with pytest.raises(ValueError, match=r"a pair of both, \(mixer, Layout\)"):
        Design(layers={0: part})


def test_an_option_given_twice_is_refused():
    with pytest.raises(ValueError, match="'length' is given twice"):
        design("relu(length=3,length=4)")


def test_a_model_of_one_layer_has_nothing_to_skip_to():
    with pytest.raises(ValueError, match="a model of 1 layer has no earlier layer"):
        design("skip").layer(0, 1)
