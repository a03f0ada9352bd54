import contextlib
from collections.abc import Iterator

import pytest
import torch

from formix.ops import implementations
from formix.ops.triton import INTERPRETED


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`impl` runs over the implementations that this machine has of the operator named by the module's OP."""
    if "impl" in metafunc.fixturenames:
        op = metafunc.module.OP
        found = [i.impl for i in implementations() if i.op == op and i.available]
        metafunc.parametrize("impl", found, indirect=True)


@pytest.fixture
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Its name; meanwhile tensors are made on the GPU if that is where it runs."""
    on_gpu = request.param == "triton" and not INTERPRETED
    with torch.device("cuda") if on_gpu else contextlib.nullcontext():
        yield request.param
