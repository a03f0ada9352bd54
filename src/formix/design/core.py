"""The design of a model's blocks and of a single layer, and both as plain data."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from formix.design.checks import check_flags, deep_tuple, is_count
from formix.design.layout import Layout
from formix.design.mixers import MIXERS, GatedUnit, Mixer, Sima, Softmax
from formix.design.wiring import Wiring

Part = Mixer | Layout | tuple[Mixer, Layout]  # what a single layer may have of its own


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

    @property
    def tied_norms(self) -> bool:
        """Whether one norm stands before both branches: Activator's official code."""
        return self.official and isinstance(self.mixer, GatedUnit)


@dataclass(frozen=True, kw_only=True)
class Design:
    """Everything about a model's blocks that changes its mathematics; saved inside the model's config."""

    mixer: Mixer = field(default_factory=Softmax)
    layout: Layout = field(default_factory=Layout)
    wiring: Wiring | None = None
    official: bool = False  # reproduce the official code's quirks (tied norms, unused norms), as its checkpoints need
    layers: Mapping[int, Part] = field(default_factory=dict)  # single layers that differ; -1 is the last

    def __post_init__(self) -> None:
        if not isinstance(self.mixer, get_args(Mixer)):
            raise ValueError(
                f"mixer is {self.mixer!r}; it must be one of {', '.join(m.__name__ for m in get_args(Mixer))}."
            )
        if not isinstance(self.layout, Layout) or not isinstance(self.wiring, Wiring | None):
            raise ValueError(
                f"layout is {self.layout!r} and wiring {self.wiring!r}; they must be a Layout, and a Wiring or None."
            )
        check_flags(self, "official")
        if not isinstance(self.layers, Mapping):
            raise ValueError(f"layers is {self.layers!r}; it must map layer numbers to {_PARTS}.")
        object.__setattr__(self, "layers", dict(self.layers))  # a copy: nobody else's changes reach this design
        for layer, part in self.layers.items():
            if not is_count(layer) or not _is_part(part):
                raise ValueError(f"layers has {layer!r}: {part!r}; it must map layer numbers to {_PARTS}.")
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
            if number % depth != index:
                continue
            for choice in _choices(part):
                kind = "layout" if isinstance(choice, Layout) else "mixer"
                if kind in overrides:
                    raise ValueError(
                        f"layers names layer {index} twice, as {index} and {index - depth} of {depth} layers; "
                        "leave out one of the two."
                    )
                overrides[kind] = choice
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
            "layers": {str(i): _part_to_dict(p) for i, p in sorted(self.layers.items())},
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
            mixer=part_from_dict(data.get("mixer", {"kind": "softmax"})),
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
        norm = f", {self.layout.norm}-norm" if self.layout.norm else ""
        if self.layout.parallel:
            parts.append(f"x + mixer(x) + FFN(x){norm}")
        elif not self.layout.ffn:
            parts.append(f"no FFN{norm}")
        elif norm:
            parts.append(norm.removeprefix(", "))
        if self.wiring is not None:
            parts.append(f"K, V of layer {self.wiring.source} for heads {self.wiring.heads}")
        own: dict[str, list[int]] = {}
        for i, part in self.layers.items():
            words = (choice.words if isinstance(choice, Layout) else choice.formula for choice in _choices(part))
            own.setdefault(", ".join(words), []).append(i)
        parts += [f"layer{'s' * (len(i) > 1)} {', '.join(map(str, i))}: {words}" for words, i in own.items()]
        if self.official:
            parts.append("as the official code")
        return "; ".join(parts)


_PARTS = "a mixer, a Layout or a pair of both, (mixer, Layout)"


def _is_part(part: Any) -> bool:
    if isinstance(part, tuple):
        return len(part) == 2 and isinstance(part[0], get_args(Mixer)) and isinstance(part[1], Layout)
    return isinstance(part, (*get_args(Mixer), Layout))


def _choices(part: Part) -> tuple[Mixer | Layout, ...]:
    return part if isinstance(part, tuple) else (part,)


def _mixer_to_dict(mixer: Mixer) -> dict[str, Any]:
    return {"kind": mixer.kind, **dataclasses.asdict(mixer)}


def _part_to_dict(part: Part) -> dict[str, Any]:
    if isinstance(part, tuple):
        return {"mixer": _mixer_to_dict(part[0]), "layout": dataclasses.asdict(part[1])}
    return {"kind": "layout", **dataclasses.asdict(part)} if isinstance(part, Layout) else _mixer_to_dict(part)


def _layers_from_dict(data: Any) -> dict[int, Any]:
    if not isinstance(data, Mapping) or not all(re.fullmatch(r"-?\d+", str(number)) for number in data):
        raise ValueError(f"layers is {data!r}; it must map layer numbers to {_PARTS}.")
    return {int(number): part_from_dict(part) for number, part in data.items()}


def _known(data: Mapping[str, Any], names: set[str], what: str) -> None:
    unknown = sorted(set(data) - names, key=str)
    if unknown:
        raise ValueError(f"{', '.join(map(repr, unknown))} is no field of {what}; it has {', '.join(sorted(names))}.")


def _build(part: Any, data: Mapping[str, Any], what: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} is {data!r}; it must be a mapping of its fields.")
    _known(data, {f.name for f in fields(part)}, what)
    return part(**{k: deep_tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def part_from_dict(data: Mapping[str, Any]) -> Any:
    """A mixer, a layout or, from both by their names, a pair."""
    if isinstance(data, Mapping) and data.keys() == {"mixer", "layout"}:
        return part_from_dict(data["mixer"]), _build(Layout, data["layout"], "layout")
    if not isinstance(data, Mapping) or data.get("kind") not in (*MIXERS, "layout"):
        raise ValueError(f"{data!r} is no mixer; its 'kind' must be one of {', '.join(MIXERS)}.")
    rest = {k: v for k, v in data.items() if k != "kind"}
    return _build(Layout if data["kind"] == "layout" else MIXERS[data["kind"]], rest, data["kind"])
