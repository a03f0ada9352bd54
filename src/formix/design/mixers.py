"""How tokens exchange information: the mixers and their fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from formix.design.checks import check, check_flags, is_count, is_number

Activation = Literal["relu", "relu2", "gelu", "gelu_erf", "softplus", "identity", "relu6", "sigmoid", "sigmoid_bias"]
Gate = Literal["identity", "silu", "sigmoid"]
GluActivation = Literal["gelu", "silu", "relu", "sigmoid", "identity"]


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """O = softmax(Q K^T / sqrt(d_h)) V, the baseline."""

    kind: ClassVar[str] = "softmax"
    has_keys: ClassVar[bool] = True

    qk_norm: bool = False  # scale-only LayerNorm (eps 1e-6) of every query and key over the head's width
    gate: Gate | None = None  # multiply the mixer's output by act(x W_g + b_g) before the output projection

    def __post_init__(self) -> None:
        check_flags(self, "qk_norm")
        check(self.gate, (None, *get_args(Gate)), "gate")

    @property
    def formula(self) -> str:
        """In one line, with the options that are chosen."""
        return _gated(f"softmax({_scores(self)}) V", self.gate)


@dataclass(frozen=True, kw_only=True)
class Pointwise:
    """O = L^-a h(Q K^T / sqrt(d_h)) V (arXiv 2309.08586): no normalisation over tokens."""

    kind: ClassVar[str] = "pointwise"
    has_keys: ClassVar[bool] = True

    activation: Activation = "relu"  # h
    length_exponent: float = 1.0  # a
    length: int | Literal["visible", "keys"] = "visible"  # L: keys a row may see, all keys, or a fixed number
    qk_norm: bool = False  # scale-only LayerNorm (eps 1e-6) of every query and key over the head's width
    gate: Gate | None = None  # multiply the mixer's output by act(x W_g + b_g) before the output projection

    def __post_init__(self) -> None:
        check(self.activation, get_args(Activation), "activation")
        check(self.gate, (None, *get_args(Gate)), "gate")
        check_flags(self, "qk_norm")
        if not is_number(self.length_exponent):
            raise ValueError(f"length_exponent is {self.length_exponent!r}; it must be a number that is 0 or more.")
        if not 0 <= self.length_exponent < float("inf"):
            raise ValueError(f"length_exponent is {self.length_exponent}; it must be finite and 0 or more.")
        if self.activation == "sigmoid_bias" and self.length_exponent not in (0, 1):
            raise ValueError(
                f"length_exponent is {self.length_exponent}, but in 'sigmoid_bias' the length enters as the bias "
                "-log L instead; leave length_exponent at 1 or use activation='sigmoid'."
            )
        if self.length not in ("visible", "keys") and not (is_count(self.length) and int(self.length) > 0):
            raise ValueError(f"length is {self.length!r}; it must be 'visible', 'keys' or a positive number of tokens.")
        object.__setattr__(self, "length_exponent", float(self.length_exponent))  # 1 and 1.0 are one design

    @property
    def formula(self) -> str:
        """In one line, with the options that are chosen."""
        number = {"visible": "L", "keys": "Nₖ"}.get(str(self.length), str(self.length))
        if self.activation == "sigmoid_bias":
            return _gated(f"sigmoid({_scores(self)} - log {number}) V", self.gate)
        factor = f"{number}^-{self.length_exponent:g} " if self.length_exponent else ""
        return _gated(f"{factor}{self.activation}({_scores(self)}) V", self.gate)


@dataclass(frozen=True, kw_only=True)
class Sima:
    """O = Q^ (K^^T V), Q^ and K^ l1-normalised per channel over the tokens (arXiv 2206.08898)."""

    kind: ClassVar[str] = "sima"
    has_keys: ClassVar[bool] = True

    num_heads: int | None = None  # None: the model's; 1 is the paper's single-head variant
    eps: float = 1e-12  # lower bound of every norm

    def __post_init__(self) -> None:
        if self.num_heads is not None and (not is_count(self.num_heads) or self.num_heads < 1):
            raise ValueError(f"num_heads is {self.num_heads!r}; it must be None (the model's) or 1 or more.")
        if not is_number(self.eps) or not 0 < self.eps < 1:
            raise ValueError(f"eps is {self.eps!r}; it must be between 0 and 1.")

    @property
    def formula(self) -> str:
        """In one line, with the options that are chosen."""
        q, k = ("‖Q‖₁", "‖K‖₁") if self.eps == 1e-12 else (f"max(‖{x}‖₁, {self.eps:g})" for x in "QK")
        heads = "" if self.num_heads is None else f", num_heads={self.num_heads}"
        return f"Q̂ (K̂ᵀ V), Q̂ = Q/{q} and K̂ = K/{k} over tokens{heads}"


@dataclass(frozen=True, kw_only=True)
class GatedUnit:
    """y = (act(x W1 + b1) * (x W2 + b2)) W3 + b3 (arXiv 2405.15953): every token by itself, none are mixed."""

    kind: ClassVar[str] = "gated_unit"
    has_keys: ClassVar[bool] = False

    activation: GluActivation = "gelu"  # on the first branch
    inner_norm: bool = False  # LayerNorm (eps 1e-5) of both branches before their product
    ratio: float = 2.0  # inner width over model width

    def __post_init__(self) -> None:
        check(self.activation, get_args(GluActivation), "activation")
        check_flags(self, "inner_norm")
        if not is_number(self.ratio) or not 0 < self.ratio < 1e3:
            raise ValueError(f"ratio is {self.ratio!r}; the inner width must be a positive multiple of the model's.")
        object.__setattr__(self, "ratio", float(self.ratio))

    @property
    def formula(self) -> str:
        """In one line, with the options that are chosen."""
        u, v = "xW₁" if self.activation == "identity" else f"{self.activation}(xW₁)", "xW₂"
        if self.inner_norm:
            u, v = f"LN({u})", f"LN({v})"
        return f"({u} ⊙ {v}) W₃" + ("" if self.ratio == 2 else f", ratio={self.ratio:g}")


def _scores(mixer: Softmax | Pointwise) -> str:
    return "LN(Q)LN(K)ᵀ/√d" if mixer.qk_norm else "QKᵀ/√d"


def _gated(formula: str, gate: Gate | None) -> str:
    if gate is None:
        return formula
    return f"({formula}) ⊙ " + ("xW" if gate == "identity" else f"{gate}(xW)")


Mixer = Softmax | Pointwise | Sima | GatedUnit
MIXERS: dict[str, type[Mixer]] = {m.kind: m for m in get_args(Mixer)}
