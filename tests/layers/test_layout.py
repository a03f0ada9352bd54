"""The four formulas of a block, with named functions in the place of its parts."""

import pytest
import torch

from formix.design import Layout
from formix.layers import compose
from formix.layers.layout import norm_position, norms_used

CASES = {
    "series_pre": (Layout(), "pre", lambda x, a, f, n, m: (y := x + a(n(x))) + f(m(y))),
    "series_post": (Layout(), "post", lambda x, a, f, n, m: m((y := n(x + a(x))) + f(y))),
    "parallel_pre": (Layout(parallel=True), "pre", lambda x, a, f, n, m: x + a(n(x)) + f(n(x))),
    "parallel_post": (Layout(parallel=True), "post", lambda x, a, f, n, m: m(x + a(x) + f(x))),
    "no_ffn_pre": (Layout(ffn=False), "pre", lambda x, a, f, n, m: x + a(n(x))),
    "no_ffn_post": (Layout(ffn=False), "post", lambda x, a, f, n, m: n(x + a(x))),
}


@pytest.mark.parametrize("case", CASES)
def test_formula(case):
    layout, norm, formula = CASES[case]
    a, f, n, m = (torch.nn.Linear(4, 4).double() for _ in range(4))
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    out = compose(x, a, f if layout.ffn else None, n, m, layout=layout, norm=norm)
    torch.testing.assert_close(out, formula(x, a, f, n, m), rtol=1e-14, atol=1e-14)
    gradients = torch.autograd.grad(out.sum(), [n.weight, m.weight], allow_unused=True)
    assert tuple(g is not None for g in gradients) == norms_used(layout, norm)


@pytest.mark.parametrize("case", CASES)
def test_norms_used(case):
    """Exactly the norms that the formula calls are said to be used."""
    layout, norm, formula = CASES[case]
    called = set()

    def part(label):
        def run(x):
            called.add(label)
            return x

        return run

    formula(torch.ones(1), part("a"), part("f"), part("n"), part("m"))
    assert norms_used(layout, norm) == ("n" in called, "m" in called)


@pytest.mark.parametrize("trunk", ["pre", "post"])
def test_the_layout_s_own_norm_wins(trunk):
    assert norm_position(Layout(), trunk) == trunk
    assert norm_position(Layout(norm="pre"), trunk) == "pre"
    assert norm_position(Layout(norm="post"), trunk) == "post"
    assert norms_used(Layout(parallel=True, norm="post"), trunk) == (False, True)


def test_a_norm_that_is_neither_is_refused():
    with pytest.raises(ValueError, match="norm is 'Pre'; it must be 'pre' or 'post'"):
        norm_position(Layout(), "Pre")
