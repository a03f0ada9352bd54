"""Cases measured in a process of their own: held to an instruction set, PyTorch too, or watched for its peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch

from formix.benchmarks.attention import AttentionCase
from formix.benchmarks.measure import measure
from formix.benchmarks.memory import peak_growth, peak_resident
from formix.benchmarks.results import Case
from formix.records import parse, plain

# what holds PyTorch, oneDNN and MKL to the instructions of each of formix's instruction sets
LIMITS = {
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def measure_on(isa: str, cases: list[AttentionCase], *, seconds: float, threads: int) -> tuple[Case, ...]:
    """Measure the cases once where formix and PyTorch both have no more than one of `LIMITS`' instruction sets."""
    answer = _child(
        {"work": "times", "cases": plain(cases), "seconds": seconds, "threads": threads},
        {"FORMIX_ISA": isa, **LIMITS[isa]},
    )
    return tuple(parse(Case, case) for case in answer)


def peak_memory(case: AttentionCase, *, threads: int) -> tuple[int, int | None]:
    """Of one call of the case's first contender in a fresh process: bytes resident at that process's peak, with all it
    holds, and what the inputs and the call add to it (see `peak_growth`)."""
    peak, growth = _child({"work": "memory", "cases": plain([case]), "seconds": 0.0, "threads": threads}, {})
    return peak, growth


def _child(request: dict[str, Any], environment: dict[str, str]) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "formix.benchmarks.isolated"],
        input=json.dumps(request),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ValueError(f"The measurement in a process of its own failed: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def _main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    cases = [parse(AttentionCase, case) for case in request["cases"]]
    if request["work"] == "times":
        print(json.dumps(plain(measure("attention", cases, repetitions=1, seconds=request["seconds"]))))
        return
    growth = peak_growth(lambda: next(iter(cases[0].calls().values()))())
    print(json.dumps([peak_resident(), growth]))


if __name__ == "__main__":
    _main()
