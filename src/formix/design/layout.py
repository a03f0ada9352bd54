"""How mixer and FFN sit together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from formix.design.checks import check, check_flags


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
        check(self.norm, (None, "pre", "post"), "norm")
        check_flags(self, "parallel", "ffn")
        if self.parallel and not self.ffn:
            raise ValueError("A parallel layout without an FFN has nothing to be parallel to: choose one of the two.")

    @property
    def words(self) -> str:
        """The layout for people: "series", "parallel, post-norm"."""
        kind = "parallel" if self.parallel else "series" if self.ffn else "no FFN"
        return f"{kind}, {self.norm}-norm" if self.norm else kind
