"""A synthetic benchmark. The numbers are invented and mean nothing."""

import pytest

from formix.benchmarks.results import Benchmark, Case, Check, Timing
from formix.environment import Environment

ENVIRONMENT = Environment(
    formix="0.0-synthetic",
    python="3.12.1",
    torch="2.9.0",
    cpu="Synthetic processor",
    instruction_set="AVX512",
    threads=2,
    platform="Linux",
)


def attention_case(tokens: int, relu: tuple[float, ...], softmax: tuple[float, ...], name: str | None = None) -> Case:
    settings = {
        "tokens": tokens, "batch": 2, "heads": 6, "head_size": 64, "dtype": "bfloat16",
        "backward": False, "causal": False, "only": None,
    }  # fmt: skip
    return Case(
        name=name or f"relu forward N={tokens}",
        bench="attention",
        settings=settings,
        timings={
            "relu": Timing(seconds=relu, rounds=9, flops=4_000_000, memory=1 << 20),
            "softmax": Timing(seconds=softmax, rounds=9, flops=4_000_000),
            "matmul": Timing(seconds=(0.004,) * len(relu), rounds=9, flops=16_000_000),
        },
    )


@pytest.fixture
def measured() -> Benchmark:
    return Benchmark(
        command="formix bench attention",
        created="2026-01-01T00:00:00+00:00",
        environment=ENVIRONMENT,
        isa="avx2",
        config={"tokens": "128,256"},
        cases=(
            attention_case(128, (0.001, 0.002, 0.004), (0.004, 0.004, 0.006)),
            attention_case(256, (0.002, 0.002, 0.002), (0.005, 0.006, 0.007)),
        ),
        checks=(
            Check(target=1, quantity="bfloat16: times faster", where="N = 128", value=2.0, bound=3.0),
            Check(target=1, quantity="bfloat16: times faster", where="N = 256", value=3.5, bound=3.0),
            Check(target=5, quantity="growth", where="N = 256", value=1.2, bound=1.3, at_most=True),
        ),
    )
