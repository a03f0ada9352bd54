"""What earlier layers a block reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from formix.design.checks import deep_tuple, is_count


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
                object.__setattr__(self, name, deep_tuple(getattr(self, name)))
        if isinstance(self.source, str):
            readable = bool(_PRESET.fullmatch(self.source) or _TYPES.fullmatch(self.source))
        else:
            readable = isinstance(self.source, tuple) and all(s is None or is_count(s) for s in self.source)
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
            if not all(is_count(i) and i >= 0 for row in rows for i in row):
                raise ValueError(f"heads is {h!r}; it must be numbers of heads, or one list of them per layer.")

    @classmethod
    def distance(cls, n: int = 1, **heads: Any) -> Wiring:
        """Every layer l >= n reads layer l - n."""
        return cls(source=f"distance({n})", **heads)

    @classmethod
    def last(cls, count: int, distance: int = 1, **heads: Any) -> Wiring:
        """The last `count` layers read the layer `distance` below them, where there is one."""
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
                allowed = f"None or an earlier layer, 0 to {layer - 1}" if layer else "None, for no layer is earlier"
                raise ValueError(f"source of layer {layer} is {s}; it must be {allowed}.")
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
