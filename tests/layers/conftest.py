import pytest

import formix


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`any_design` runs over all designs and their most involved combinations."""
    if "any_design" in metafunc.fixturenames:
        combined = ["relu+paf+skip", "sima+parallel", "relu(gate=silu,qk_norm=true)+skip", "sima+skip"]
        metafunc.parametrize("any_design", [*formix.list_designs(), *combined])
