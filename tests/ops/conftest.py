import pytest

from formix.ops import implementations


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`impl` runs over the implementations that this machine has of the operator named by the module's OP."""
    if "impl" in metafunc.fixturenames:
        op = metafunc.module.OP
        metafunc.parametrize("impl", [i.impl for i in implementations() if i.op == op and i.available])
