"""Which implementation runs, and what an explicit one says when it cannot."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from formix.ops import implementations, l1_attention, pointwise_attention
from formix.ops.registry import ACCELERATED, IMPLS, OPERATORS, _announce, native_module

X = torch.zeros(1, 2, 5, 4)
FUNCTIONS = {"pointwise_attention": pointwise_attention, "l1_attention": l1_attention}
HAS_NATIVE = any(i.available for i in implementations() if i.impl == "native")


def test_every_operator_has_the_reference_and_every_row_is_complete():
    rows = implementations()
    assert {i.op for i in rows if i.impl == "reference" and i.available} == set(OPERATORS)
    assert {i.op for i in rows if i.impl == "native"} == set(ACCELERATED) == set(FUNCTIONS)
    for row in rows:
        assert row.impl in IMPLS
        assert bool(row.isa) is row.available, row
        assert bool(row.reason) is not row.available, row
    assert len({(i.op, i.impl) for i in rows}) == len(rows)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_an_implementation_that_cannot_run_says_why(op):
    function = FUNCTIONS[op]
    for row in implementations():
        if row.op == op and not row.available:
            with pytest.raises(ValueError, match=f"impl='{row.impl}' cannot run this {op}: ") as refusal:
                function(X, X, X, impl=row.impl)
            assert row.reason in str(refusal.value)
    with pytest.raises(ValueError, match=f"impl='native' cannot run this {op}"):
        function(X.double(), X.double(), X.double(), impl="native")


@pytest.mark.parametrize("op", FUNCTIONS)
def test_auto_falls_back_for_what_the_kernels_do_not_know(op):
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    assert torch.equal(FUNCTIONS[op](x, x, x), FUNCTIONS[op](x, x, x, impl="reference"))


def test_orders_and_dropout_are_the_reference_s():
    with pytest.raises(ValueError, match="impl='native' cannot run"):
        l1_attention(X, X, X, order="qk_v", impl="native")
    with pytest.raises(ValueError, match="impl='native' cannot run"):
        pointwise_attention(X, X, X, dropout_p=0.1, impl="native")
    assert l1_attention(X, X, X, order="qk_v").shape == X.shape
    assert pointwise_attention(X, X, X, dropout_p=0.1).shape == X.shape


def test_auto_says_once_what_runs(caplog):
    _announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="formix"):
        for _ in range(3):
            pointwise_attention(X, X, X)
            l1_attention(X, X, X, impl="reference")
    expected = "native" if HAS_NATIVE else "reference"
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == [f"pointwise_attention runs as {expected}"]


def test_formix_native_0_turns_the_kernels_off():
    code = (
        "from formix.ops import implementations\n"
        "native = [i for i in implementations() if i.impl == 'native']\n"
        "assert native and not any(i.available for i in native), native\n"
        "print(native[0].reason)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FORMIX_NATIVE": "0"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "FORMIX_NATIVE=0" in run.stdout


def test_native_rows_tell_what_the_module_tells():
    module = native_module()
    available, detail = module.available() if module else (False, "")
    for row in implementations():
        if row.impl == "native":
            assert row.available is available
            assert detail in (row.isa or row.reason)


def test_torch_compile_sees_one_graph():
    """In a new process, so that nothing has looked for the kernels before the compiler does."""
    code = (
        "import torch, formix.ops\n"
        "x = torch.randn(1, 2, 5, 4, requires_grad=True)\n"
        "for op in (formix.ops.pointwise_attention, formix.ops.l1_attention):\n"
        "    out = torch.compile(op, fullgraph=True, backend='eager')(x, x, x)\n"
        "    torch.testing.assert_close(out, op(x, x, x))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
