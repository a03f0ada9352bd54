"""Series or parallel, pre- or post-norm: the order of a block's parts, for every model family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from formix.design import LayerDesign, Layout

Branch = Callable[[Tensor], Tensor]
Norm = Literal["pre", "post"]


def norm_position(layout: Layout, trunk: Norm) -> Norm:
    """The layout's own position of the norms, or the trunk's; raises `ValueError` for one that is neither."""
    if trunk not in get_args(Norm):
        raise ValueError(f"norm is {trunk!r}; it must be 'pre' or 'post'.")
    return layout.norm or trunk


def norms_used(layout: Layout, trunk: Norm) -> tuple[bool, bool]:
    """Whether the layout applies the first and the second of a block's two norms."""
    if layout.parallel:
        pre = norm_position(layout, trunk) == "pre"
        return pre, not pre
    return True, layout.ffn


def norms_kept(layer: LayerDesign, trunk: Norm) -> tuple[bool, bool]:
    """Whether a layer has its first and its second norm: those it uses, and with `official` both of a parallel layout
    (PAF's checkpoints have the unused one). Of tied norms there is the first alone."""
    first, second = norms_used(layer.layout, trunk)
    if layer.official and layer.layout.parallel:
        first = second = True
    return first, second and not layer.tied_norms


def compose(
    x: Tensor, mixer: Branch, ffn: Branch | None, norm1: Branch, norm2: Branch, *, layout: Layout, norm: Norm
) -> Tensor:
    """One block: `formix.design.Layout` has the four formulas. x is [B, N, C] and so is the result.

    `mixer` and `ffn` are whole branches: with their dropout, layer scale and stochastic depth, without the residual.
    """
    pre = norm == "pre"
    if layout.parallel:
        assert ffn is not None
        if pre:
            h = norm1(x)
            return x + mixer(h) + ffn(h)
        return norm2(x + mixer(x) + ffn(x))
    x = x + mixer(norm1(x)) if pre else norm1(x + mixer(x))
    if ffn is None:
        return x
    return x + ffn(norm2(x)) if pre else norm2(x + ffn(x))
