"""What a block is: three independent choices, and the names of their combinations.

A `Design` says everything that changes the mathematics of a model's blocks and nothing that changes only their speed:

    mixer    how tokens exchange information   Softmax, Pointwise, Sima, GatedUnit
    layout   how mixer and FFN sit together    Layout: series or parallel, pre- or post-norm, with or without an FFN
    wiring   what earlier layers a block reads Wiring: keys and values of a source layer for some heads

Each choice holds for all layers; `layers` replaces the mixer or the layout of single ones (hybrids).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, get_args

Activation = Literal["relu", "relu2", "gelu", "gelu_erf", "softplus", "identity", "relu6", "sigmoid", "sigmoid_bias"]
Gate = Literal["identity", "silu", "sigmoid"]
GluActivation = Literal["gelu", "silu", "relu", "sigmoid", "identity"]


def _check(value: object, allowed: tuple[object, ...], what: str) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def _check_flags(part: object, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(part, name), bool):
            raise ValueError(f"{name} is {getattr(part, name)!r}; it must be true or false.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """O = softmax(Q K^T / sqrt(d_h)) V, the baseline."""

    kind: ClassVar[str] = "softmax"
    formula: ClassVar[str] = "softmax(QKᵀ/√d) V"
    has_keys: ClassVar[bool] = True

    qk_norm: bool = False  # scale-only LayerNorm (eps 1e-6) of every query and key over the head's width
    gate: Gate | None = None  # multiply the mixer's output by act(x W_g + b_g) before the output projection

    def __post_init__(self) -> None:
        _check_flags(self, "qk_norm")
        _check(self.gate, (None, *get_args(Gate)), "gate")


@dataclass(frozen=True, kw_only=True)
class Pointwise:
    """O = L^-a h(Q K^T / sqrt(d_h)) V (arXiv 2309.08586): no normalisation over tokens."""

    kind: ClassVar[str] = "pointwise"
    formula: ClassVar[str] = "L⁻ᵃ h(QKᵀ/√d) V"
    has_keys: ClassVar[bool] = True

    activation: Activation = "relu"  # h
    length_exponent: float = 1.0  # a
    length: int | Literal["visible", "keys"] = "visible"  # L: keys a row may see, all keys, or a fixed number
    qk_norm: bool = False  # scale-only LayerNorm (eps 1e-6) of every query and key over the head's width
    gate: Gate | None = None  # multiply the mixer's output by act(x W_g + b_g) before the output projection

    def __post_init__(self) -> None:
        _check(self.activation, get_args(Activation), "activation")
        _check(self.gate, (None, *get_args(Gate)), "gate")
        _check_flags(self, "qk_norm")
        if not _is_number(self.length_exponent):
            raise ValueError(f"length_exponent is {self.length_exponent!r}; it must be a number that is 0 or more.")
        if not 0 <= self.length_exponent < float("inf"):
            raise ValueError(f"length_exponent is {self.length_exponent}; it must be finite and 0 or more.")
        if self.activation == "sigmoid_bias" and self.length_exponent not in (0, 1):
            raise ValueError(
                f"length_exponent is {self.length_exponent}, but in 'sigmoid_bias' the length enters as the bias "
                "-log L instead; leave length_exponent at 1 or use activation='sigmoid'."
            )
        if self.length not in ("visible", "keys") and not (_is_count(self.length) and int(self.length) > 0):
            raise ValueError(f"length is {self.length!r}; it must be 'visible', 'keys' or a positive number of tokens.")
        object.__setattr__(self, "length_exponent", float(self.length_exponent))  # 1 and 1.0 are one design


@dataclass(frozen=True, kw_only=True)
class Sima:
    """O = Q^ (K^^T V), Q^ and K^ l1-normalised per channel over the tokens (arXiv 2206.08898)."""

    kind: ClassVar[str] = "sima"
    formula: ClassVar[str] = "Q̂ (K̂ᵀ V), Q̂ = Q/‖Q‖₁ and K̂ = K/‖K‖₁ over tokens"
    has_keys: ClassVar[bool] = True

    num_heads: int | None = None  # None: the model's; 1 is the paper's single-head variant
    eps: float = 1e-12  # lower bound of every norm

    def __post_init__(self) -> None:
        if self.num_heads is not None and (not _is_count(self.num_heads) or self.num_heads < 1):
            raise ValueError(f"num_heads is {self.num_heads!r}; it must be None (the model's) or 1 or more.")
        if not _is_number(self.eps) or not 0 < self.eps < 1:
            raise ValueError(f"eps is {self.eps!r}; it must be between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class GatedUnit:
    """y = (act(x W1 + b1) * (x W2 + b2)) W3 + b3 (arXiv 2405.15953): every token by itself, none are mixed."""

    kind: ClassVar[str] = "gated_unit"
    formula: ClassVar[str] = "(act(xW₁) ⊙ xW₂) W₃"
    has_keys: ClassVar[bool] = False

    activation: GluActivation = "gelu"  # on the first branch
    inner_norm: bool = False  # LayerNorm (eps 1e-5) of both branches before their product
    ratio: float = 2.0  # inner width over model width

    def __post_init__(self) -> None:
        _check(self.activation, get_args(GluActivation), "activation")
        _check_flags(self, "inner_norm")
        if not _is_number(self.ratio) or not 0 < self.ratio < 1e3:
            raise ValueError(f"ratio is {self.ratio!r}; the inner width must be a positive multiple of the model's.")
        object.__setattr__(self, "ratio", float(self.ratio))


Mixer = Softmax | Pointwise | Sima | GatedUnit
MIXERS: dict[str, type[Mixer]] = {m.kind: m for m in get_args(Mixer)}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How mixer A and feed-forward F sit together.

    series    pre  x += A(norm1 x); x += F(norm2 x)              post  x = norm1(x + A x); x = norm2(x + F x)
    parallel  pre  x += A(norm1 x) + F(norm1 x)  (PaLM, GPT-J)   post  x = norm2(x + A x + F x)  (PAF, 2305.13297)
    """

    parallel: bool = False
    norm: Literal["pre", "post"] | None = None  # None: as the model has it
    ffn: bool = True

    def __post_init__(self) -> None:
        _check(self.norm, (None, "pre", "post"), "norm")
        _check_flags(self, "parallel", "ffn")
        if self.parallel and not self.ffn:
            raise ValueError("A parallel layout without an FFN has nothing to be parallel to: choose one of the two.")


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """Which heads of a layer read keys and values of an earlier layer (skip-layer attention, arXiv 2406.11274).

    K~_{l,i} = K_{s(l),i} if i in S_l else K_{l,i}, and V~ likewise, with K, V the layers' own projections.
    The paper leaves the map s open; see `resolve` for the notations. Grouped-query models count key/value heads.
    """

    source: str | tuple[int | None, ...] = "distance(1)"
    heads: float | int | tuple[int, ...] | tuple[tuple[int, ...], ...] = 0.75  # share, first n, or the heads' numbers

    def __post_init__(self) -> None:
        for name in ("source", "heads"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, _deep_tuple(getattr(self, name)))
        if isinstance(self.source, str):
            readable = bool(_PRESET.fullmatch(self.source) or _TYPES.fullmatch(self.source))
        else:
            readable = isinstance(self.source, tuple) and all(s is None or _is_count(s) for s in self.source)
        if not readable:
            raise ValueError(
                f"source is {self.source!r}; it must be 'distance(n)', 'last(count, distance)', 'fixed(layer)', one "
                "layer number or None per layer, or these numbers joined by '_' (a layer's own number: no skip)."
            )
        h = self.heads
        if isinstance(h, bool) or not isinstance(h, float | int | tuple):
            raise ValueError(f"heads is {h!r}; give a share in (0, 1], a number of heads or the heads themselves.")
        if isinstance(h, float) and not 0 < h <= 1:
            raise ValueError(f"heads is {h}; as a share of all heads it must be above 0 and at most 1.")
        if isinstance(h, int) and h < 0:
            raise ValueError(f"heads is {h}; as a number of heads it must be 0 or more.")
        if isinstance(h, tuple):
            rows: tuple[Any, ...] = h if h and all(isinstance(row, tuple) for row in h) else (h,)
            if not all(_is_count(i) and i >= 0 for row in rows for i in row):
                raise ValueError(f"heads is {h!r}; it must be numbers of heads, or one list of them per layer.")

    @classmethod
    def distance(cls, n: int = 1, **heads: Any) -> Wiring:
        """Every layer l >= n reads layer l - n."""
        return cls(source=f"distance({n})", **heads)

    @classmethod
    def last(cls, count: int, distance: int = 1, **heads: Any) -> Wiring:
        """The last `count` layers read the layer `distance` below them."""
        return cls(source=f"last({count},{distance})", **heads)

    @classmethod
    def fixed(cls, source: int = 0, **heads: Any) -> Wiring:
        """Every layer above `source` reads layer `source`."""
        return cls(source=f"fixed({source})", **heads)

    def resolve(self, depth: int) -> tuple[int | None, ...]:
        """Source layer of every layer of a model of `depth` layers, or None."""
        if isinstance(self.source, tuple):
            explicit = self.source
        elif _TYPES.fullmatch(self.source):
            numbers = [int(n) for n in self.source.split("_")]
            explicit = tuple(None if n == layer else n for layer, n in enumerate(numbers))
        else:
            return self._resolve_preset(depth)
        if len(explicit) != depth:
            raise ValueError(f"source names {len(explicit)} layers, the model has {depth}; give one entry per layer.")
        for layer, s in enumerate(explicit):
            if s is not None and not 0 <= s < layer:
                raise ValueError(
                    f"source of layer {layer} is {s}; it must be None or an earlier layer, 0 to {layer - 1}."
                )
        return explicit

    def _resolve_preset(self, depth: int) -> tuple[int | None, ...]:
        match = _PRESET.fullmatch(str(self.source))
        assert match is not None
        name, first, second = match[1] or "last", int(match[2] or match[3]), int(match[4] or 1)
        if name == "fixed":
            if first >= depth - 1:
                raise ValueError(f"source is {self.source!r}, but with {depth} layers none comes after layer {first}.")
            return tuple(first if layer > first else None for layer in range(depth))
        count, distance = (depth, first) if name == "distance" else (first, second)
        if depth == 1:
            raise ValueError(f"source is {self.source!r}, but a model of 1 layer has no earlier layer to read.")
        if not 1 <= distance < depth:
            raise ValueError(f"source is {self.source!r}; with {depth} layers the distance must be 1 to {depth - 1}.")
        if not 1 <= count <= depth:
            raise ValueError(f"source is {self.source!r}; with {depth} layers the count must be 1 to {depth}.")
        return tuple(layer - distance if layer >= max(distance, depth - count) else None for layer in range(depth))

    def skip_heads(self, layer: int, num_heads: int, depth: int) -> tuple[int, ...]:
        """The heads of `layer`, of `num_heads` key/value heads, that read the source layer."""
        h = self.heads
        if isinstance(h, tuple) and h and isinstance(h[0], tuple):
            if len(h) != depth:
                raise ValueError(f"heads names {len(h)} layers, the model has {depth}; give one entry per layer.")
            h = h[layer]
        if isinstance(h, tuple):
            if any(i not in range(num_heads) for i in h) or len(set(h)) != len(h):
                raise ValueError(f"heads is {h}; it must be different numbers from 0 to {num_heads - 1}.")
            return tuple(sorted(h))  # type: ignore[arg-type]
        if isinstance(h, float):
            return tuple(range(max(1, int(h * num_heads + 1e-9))))  # 15/22 of 22 heads are 15, whatever the rounding
        if h > num_heads:
            raise ValueError(f"heads is {h}, but the model has {num_heads} key/value heads.")
        return tuple(range(h))


_PRESET = re.compile(r"(distance|fixed)\(\s*(\d+)\s*\)|last\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?\)")
_TYPES = re.compile(r"\d+(_\d+)+")


def _deep_tuple(value: Any) -> Any:
    return tuple(_deep_tuple(v) for v in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class LayerDesign:
    """The choices of one layer, as a block needs them."""

    mixer: Mixer
    layout: Layout
    source: int | None = None  # the earlier layer that `skip_heads` read
    official: bool = False
    index: int = 0
    depth: int = 1
    wiring: Wiring | None = None

    def skip_heads(self, num_heads: int) -> tuple[int, ...]:
        """Key/value heads of this layer that read the source layer."""
        if self.source is None or self.wiring is None:
            return ()
        return self.wiring.skip_heads(self.index, num_heads, self.depth)


@dataclass(frozen=True, kw_only=True)
class Design:
    """Everything about a model's blocks that changes its mathematics; saved inside the model's config."""

    mixer: Mixer = field(default_factory=Softmax)
    layout: Layout = field(default_factory=Layout)
    wiring: Wiring | None = None
    official: bool = False  # reproduce the official code's quirks (tied norms, unused norms), as its checkpoints need
    layers: Mapping[int, Mixer | Layout] = field(default_factory=dict)  # single layers that differ; -1 is the last

    def __post_init__(self) -> None:
        if not isinstance(self.mixer, get_args(Mixer)):
            raise ValueError(
                f"mixer is {self.mixer!r}; it must be one of {', '.join(m.__name__ for m in get_args(Mixer))}."
            )
        if not isinstance(self.layout, Layout) or not isinstance(self.wiring, Wiring | None):
            raise ValueError(
                f"layout is {self.layout!r} and wiring {self.wiring!r}; they must be a Layout, and a Wiring or None."
            )
        _check_flags(self, "official")
        if not isinstance(self.layers, Mapping):
            raise ValueError(f"layers is {self.layers!r}; it must map layer numbers to a mixer or a Layout.")
        object.__setattr__(self, "layers", dict(self.layers))  # a copy: nobody else's changes reach this design
        for layer, part in self.layers.items():
            if not _is_count(layer) or not isinstance(part, (*get_args(Mixer), Layout)):
                raise ValueError(f"layers has {layer!r}: {part!r}; it must map layer numbers to a mixer or a Layout.")
        if self.wiring is not None and not self.mixer.has_keys:
            raise ValueError(
                f"Skip wiring reads keys and values of an earlier layer, and a {self.mixer.kind} mixer has none: "
                "leave out one of the two."
            )

    def __eq__(self, other: object) -> bool:
        """Equal in what is saved; the fields alone would take heads=1 (one head) for heads=1.0 (all of them)."""
        return self.to_json() == other.to_json() if isinstance(other, Design) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.to_json())

    def layer(self, index: int, depth: int) -> LayerDesign:
        """The choices of layer `index` of `depth`."""
        overrides: dict[str, Any] = {}
        for number, part in self.layers.items():
            if not -depth <= number < depth:
                raise ValueError(f"layers names layer {number}; the model has layers 0 to {depth - 1}.")
            if number % depth == index:
                kind = "layout" if isinstance(part, Layout) else "mixer"
                if kind in overrides:
                    raise ValueError(
                        f"layers names layer {index} twice, as {index} and {index - depth} of {depth} layers; "
                        "leave out one of the two."
                    )
                overrides[kind] = part
        sources = self.wiring.resolve(depth) if self.wiring is not None else (None,) * depth
        chosen = LayerDesign(
            mixer=overrides.get("mixer", self.mixer),
            layout=overrides.get("layout", self.layout),
            source=sources[index],
            official=self.official,
            index=index,
            depth=depth,
            wiring=self.wiring,
        )
        if not chosen.mixer.has_keys and (sources[index] is not None or index in sources):
            raise ValueError(f"Layer {index} has a {chosen.mixer.kind} mixer, which has no keys for the skip wiring.")
        return chosen

    def mixes_tokens(self, depth: int) -> bool:
        """Whether any of `depth` layers lets one token see another."""
        return any(self.layer(i, depth).mixer.has_keys for i in range(depth))

    def causal_refusal(self, depth: int) -> str | None:
        """Why a causal language model of `depth` layers cannot have this design, or None."""
        if any(isinstance(self.layer(i, depth).mixer, Sima) for i in range(depth)):
            return (
                "SimA cannot be causal: its l1 norms run over all tokens, so every position would see the future. "
                "Use softmax or pointwise attention in decoders."
            )
        if not self.mixes_tokens(depth):
            return (
                "Activator mixes no tokens: as a language model it would see the current token alone. "
                "Keep an attention mixer in some layers."
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` takes back."""
        return {
            "mixer": _mixer_to_dict(self.mixer),
            "layout": dataclasses.asdict(self.layout),
            "wiring": None if self.wiring is None else dataclasses.asdict(self.wiring),
            "official": self.official,
            "layers": {
                str(i): _mixer_to_dict(p) if not isinstance(p, Layout) else {"kind": "layout", **dataclasses.asdict(p)}
                for i, p in sorted(self.layers.items())
            },
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Design:
        """Rebuild a design; raises `ValueError` for unknown kinds and fields (a newer file, or a damaged one)."""
        if not isinstance(data, Mapping):
            raise ValueError(f"A design is a mapping of mixer, layout and wiring, not {data!r}.")
        _known(data, {f.name for f in fields(cls)}, "a design")
        wiring = data.get("wiring")
        return cls(
            mixer=_part_from_dict(data.get("mixer", {"kind": "softmax"})),
            layout=_build(Layout, data.get("layout", {}), "layout"),
            wiring=None if wiring is None else _build(Wiring, wiring, "wiring"),
            official=data.get("official", False),
            layers=_layers_from_dict(data.get("layers", {})),
        )

    @classmethod
    def from_json(cls, text: str) -> Design:
        try:
            return cls.from_dict(json.loads(text))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"This is not a design in JSON: {error}.") from None

    def describe(self) -> str:
        """The design's formula in one line."""
        parts = [self.mixer.formula]
        if isinstance(self.mixer, Pointwise):
            m = self.mixer
            parts = [f"L^-{m.length_exponent:g} {m.activation}(QKᵀ/√d) V" if m.activation != "sigmoid_bias" else
                     "sigmoid(QKᵀ/√d - log L) V"]  # fmt: skip
        norm = f", {self.layout.norm}-norm" if self.layout.norm else ""
        if self.layout.parallel:
            parts.append(f"x + mixer(x) + FFN(x){norm}")
        elif not self.layout.ffn:
            parts.append(f"no FFN{norm}")
        elif norm:
            parts.append(norm.removeprefix(", "))
        if self.wiring is not None:
            parts.append(f"K, V of layer {self.wiring.source} for heads {self.wiring.heads}")
        if self.layers:
            parts.append("layers " + ", ".join(f"{i}: {getattr(p, 'kind', 'layout')}" for i, p in self.layers.items()))
        return "; ".join(parts)


def _mixer_to_dict(mixer: Mixer | Layout) -> dict[str, Any]:
    return {"kind": mixer.kind, **dataclasses.asdict(mixer)}  # type: ignore[union-attr]


def _layers_from_dict(data: Any) -> dict[int, Any]:
    if not isinstance(data, Mapping) or not all(re.fullmatch(r"-?\d+", str(number)) for number in data):
        raise ValueError(f"layers is {data!r}; it must map layer numbers to a mixer or a layout.")
    return {int(number): _part_from_dict(part) for number, part in data.items()}


def _known(data: Mapping[str, Any], names: set[str], what: str) -> None:
    unknown = sorted(set(data) - names, key=str)
    if unknown:
        raise ValueError(f"{', '.join(map(repr, unknown))} is no field of {what}; it has {', '.join(sorted(names))}.")


def _build(part: Any, data: Mapping[str, Any], what: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} is {data!r}; it must be a mapping of its fields.")
    _known(data, {f.name for f in fields(part)}, what)
    return part(**{k: _deep_tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def _part_from_dict(data: Mapping[str, Any]) -> Any:
    if not isinstance(data, Mapping) or data.get("kind") not in (*MIXERS, "layout"):
        raise ValueError(f"{data!r} is no mixer; its 'kind' must be one of {', '.join(MIXERS)}.")
    rest = {k: v for k, v in data.items() if k != "kind"}
    return _build(Layout if data["kind"] == "layout" else MIXERS[data["kind"]], rest, data["kind"])


# ---------------------------------------------------------------------------------------------------- named designs

# name -> (the parts it chooses, one line about it)
_NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "softmax": ({"mixer": Softmax()}, "scaled dot-product attention, then an FFN: the baseline"),
    "relu": ({"mixer": Pointwise()}, "ReLU attention divided by sequence length (arXiv 2309.08586)"),
    "sima": ({"mixer": Sima()}, "softmax-free attention with l1-normalised queries and keys (arXiv 2206.08898)"),
    "activator": ({"mixer": GatedUnit()}, "a gated linear unit in place of attention (arXiv 2405.15953)"),
    "activator-glu": (
        {"mixer": GatedUnit(), "layout": Layout(ffn=False)},
        "Activator without the FFN: gated units alone (arXiv 2405.15953)",
    ),
    "paf": (
        {"layout": Layout(parallel=True, norm="post")},
        "attention and FFN in parallel, one norm after them (arXiv 2305.13297)",
    ),
    "parallel": (
        {"layout": Layout(parallel=True, norm="pre")},
        "attention and FFN in parallel behind one norm (GPT-J, PaLM, ViT-22B)",
    ),
    "skip": ({"wiring": Wiring()}, "some heads read keys and values of an earlier layer (arXiv 2406.11274)"),
}


def list_designs() -> dict[str, str]:
    """Names of the designs, each with one line about it; join names with '+' to combine them."""
    return {name: line for name, (_, line) in _NAMED.items()}


def design(name: str | Design | Mapping[str, Any], **options: Any) -> Design:
    """The design of that name, with options for any field of its parts.

    Args:
        name: a name of `list_designs()`, several joined by '+' (``"relu+paf+skip"``), each with options in
            parentheses if wanted (``"relu(length_exponent=0.5)+paf"``), a `Design`, or one as plain data.
        **options: fields of the mixer (``length_exponent=0.5``), the layout (``norm="pre"``), the wiring
            (``source="distance(2)"``, ``heads=3``) or the design (``official=True``, ``layers={0: "softmax"}``: a
            name, a mixer or a Layout for each layer that differs, also ``'relu(layers={"0": "softmax"})'``).

    Raises:
        ValueError: unknown name or option, two names that choose the same part, or a meaningless combination.
    """
    if isinstance(name, Design):
        return _with_options(name, options, str(name.mixer.kind))
    if isinstance(name, Mapping):
        return _with_options(Design.from_dict(name), options, "this design")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"A design is a name such as 'relu+paf' or a Design, not {name!r}.")
    parts: dict[str, Any] = {}
    chosen_by: dict[str, str] = {}
    inline: dict[str, Any] = {}
    for term in split_outside_brackets(name, "+"):
        base, written = _parse_term(term, name)
        inline |= written
        for part, value in _NAMED[base][0].items():
            if part in parts:
                raise ValueError(
                    f"Design {name!r}: {chosen_by[part]!r} and {base!r} both choose the {part}; combine names that "
                    "choose different parts, or set single layers with `layers`."
                )
            parts[part], chosen_by[part] = value, base
    try:
        return _with_options(Design(**parts), inline | options, name)
    except ValueError as error:
        raise ValueError(f"Design {name!r}: {error}") from None


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """The parts of `text` between separators outside all brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _parse_term(term: str, name: str) -> tuple[str, dict[str, Any]]:
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", term)
    if not match or match[1] not in _NAMED:
        raise ValueError(
            f"{term.strip() or name!r} is no design; known are {', '.join(_NAMED)}, and combinations "
            "such as 'relu+paf'."
        )
    options: dict[str, Any] = {}
    for item in split_outside_brackets(match[2], ",") if match[2] else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"Design {name!r}: {item.strip()!r} is no option; write option=value.")
        if key.strip() in options:
            raise ValueError(f"Design {name!r}: the option {key.strip()!r} is given twice.")
        try:
            options[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[key.strip()] = {"None": None, "True": True, "False": False}.get(value.strip(), value.strip())
    return match[1], options


def _single_layer(number: Any, part: Any) -> tuple[Any, Any]:
    """One entry of `layers` as people write it: the number as text (JSON has no others), the part by a design's name
    or as plain data."""
    if isinstance(number, str) and re.fullmatch(r"-?\d+", number):
        number = int(number)
    if isinstance(part, Mapping):
        return number, _part_from_dict(part)
    if not isinstance(part, str | Design):
        return number, part
    chosen, plain = design(part), Design()
    parts = [p for p in (chosen.mixer, chosen.layout) if p not in (plain.mixer, plain.layout)]
    if len(parts) > 1 or replace(chosen, mixer=plain.mixer, layout=plain.layout) != plain:
        raise ValueError(
            f"layers has {number!r}: {part!r}; a single layer takes another mixer or another layout, not more."
        )
    return number, parts[0] if parts else plain.mixer


def _with_options(base: Design, options: dict[str, Any], name: str) -> Design:
    remaining = dict(options)
    changes: dict[str, Any] = {k: remaining.pop(k) for k in list(remaining) if k in {f.name for f in fields(Design)}}
    if isinstance(changes.get("layers"), Mapping):
        changes["layers"] = dict(_single_layer(number, part) for number, part in changes["layers"].items())
    base = replace(base, **changes) if changes else base
    for part_name in ("mixer", "layout", "wiring"):
        part = getattr(base, part_name)
        if part is None:
            continue
        names = {f.name for f in fields(part)}
        mine = {k: remaining.pop(k) for k in list(remaining) if k in names}
        if mine:
            base = replace(base, **{part_name: replace(part, **{k: _deep_tuple(v) for k, v in mine.items()})})
    if remaining:
        parts = [p for p in (base.mixer, base.layout, base.wiring) if p is not None]
        known = [f.name for p in parts for f in fields(p)]
        raise ValueError(
            f"{', '.join(map(repr, remaining))} is no option of design {name!r}; it has {', '.join(known)}."
        )
    return base
