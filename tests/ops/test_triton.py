"""The Triton kernels without a GPU: compiled for some, and run in Triton's interpreter.

The interpreter has to be chosen before the kernels are defined, so it runs in a process of its own: the tests of
test_pointwise.py and test_l1.py, which there find one implementation more.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import JITFunction, driver  # noqa: E402

HERE = Path(__file__).parent
SHARED = {80: 163, 86: 99, 90: 227}  # KB of shared memory for a program, by compute capability
SPILLED = 256  # bytes of registers that a thread may put into memory
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
IN_FLOAT16 = "grouped_causal_mask or head_size_13 or packed_projection or no_keys"  # others in float32 alone
# Exponents differ before the kernels do; of "sigmoid_bias" 0 and 1 are all there are.
EXPONENTS = "not -0-float32 and not -2-float32 and (not -1-float32 or sigmoid_bias)"


class Elsewhere:
    """Triton's driver of a GPU that is not here."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return self.target

    def get_current_target(self):
        return self.target

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def launched(monkeypatch, capsys):
    """Compiles what a function launches: [(kernel, bytes of its registers in memory or None if compiled before)]."""
    run, found = JITFunction.run, []

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        spilled = re.search(r"(\d+) bytes spill stores", capsys.readouterr().out)
        found.append((kernel, spilled and int(spilled[1])))

    def launch(capability, function, *arguments):
        monkeypatch.setattr(driver, "_active", Elsewhere(capability))
        found.clear()
        function(*arguments)
        return list(found)

    if not hasattr(triton, "knobs"):
        pytest.skip("this Triton does not say what its kernels need")
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    return launch


def pointwise_calls(dtype, d, activation):
    """Forward and backward with as much in the kernels as there can be."""
    from formix.ops import triton_pointwise as kernels

    q, k = torch.zeros(2, 4, 48, d, dtype=dtype), torch.zeros(2, 2, 48, d, dtype=dtype)
    options = (torch.ones(48, 48, dtype=torch.bool), activation, 0.5, None, True, 0.1)
    return (kernels.forward, q, k, k, *options), (kernels.backward, q, q, k, k, *options)


def l1_calls(dtype, d, _):
    from formix.ops import triton_l1 as kernels

    x, padding = torch.zeros(2, 4, 48, d, dtype=dtype), torch.ones(2, 48, dtype=torch.bool)
    return (kernels.forward, x, x, x, padding, 1e-12), (kernels.backward, x, x, x, x, padding, 1e-12)


COMPILED = {  # name -> calls, dtype, head size, activation, compute capability
    "pointwise-fp16-64": (pointwise_calls, F16, 64, "relu", 86),
    "pointwise-bf16-80": (pointwise_calls, BF16, 80, "sigmoid_bias", 90),
    "pointwise-fp16-128": (pointwise_calls, F16, 128, "gelu", 80),
    "pointwise-fp32-64": (pointwise_calls, F32, 64, "softplus", 86),
    "pointwise-bf16-256": (pointwise_calls, BF16, 256, "relu2", 86),
    "pointwise-fp32-256": (pointwise_calls, F32, 256, "gelu_erf", 86),
    "l1-bf16-64": (l1_calls, BF16, 64, None, 86),
    "l1-fp32-64": (l1_calls, F32, 64, None, 86),
    "l1-fp16-160": (l1_calls, F16, 160, None, 90),
}
FAST = ("pointwise-fp16-64",)  # the next test compiles more


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in COMPILED])
def test_kernels_compile_and_fit_into_registers_and_shared_memory(case, launched):
    calls, dtype, d, activation, capability = COMPILED[case]
    for call in calls(dtype, d, activation):
        kernels = launched(capability, *call)
        assert any(spilled is not None for _, spilled in kernels), "ptxas says nothing of registers"
        for kernel, spilled in kernels:
            assert "cubin" in kernel.asm
            assert 0 < kernel.metadata.shared <= SHARED[capability] * 1024
            assert spilled is None or spilled <= SPILLED, kernel.metadata.name


def test_another_length_compiles_nothing(launched):
    from formix.ops import triton_l1, triton_pointwise

    def forward(n):
        x = torch.zeros(2, 4, n, 16, dtype=torch.float16)
        triton_pointwise.forward(x, x, x, None, "relu", 1.0, None, True, 0.1)
        triton_l1.forward(x, x, x, None, 1e-12)

    kernels = [kernel for kernel, _ in launched(86, forward, 48)]
    for n in (1, 49):
        assert [kernel for kernel, _ in launched(86, forward, n)] == kernels


def test_old_gpus_are_refused(monkeypatch):
    """They have no tf32 and no bfloat16, and Triton does not support them."""
    from formix.ops.triton import cannot_run

    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    monkeypatch.setattr("formix.ops.triton.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {1: (7, 5)}[device])
    assert cannot_run(x, x, x) == "the GPU has compute capability 7.5, and the kernels need 8.0"


def interpret(*arguments):
    """pytest on tests of the operators, with the Triton implementation."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    arguments = [str(HERE / x) if x.endswith(".py") else x for x in arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, cwd=HERE.parent.parent
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "passed" in run.stdout


@pytest.mark.slow
def test_interpreted_kernels_equal_the_formula_in_float16():
    """Of bfloat16 the interpreter's operators make float32."""
    interpret("test_pointwise.py", "test_l1.py", "-k", f"triton and float16 and not bfloat16 and ({IN_FLOAT16})")


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["test_pointwise.py", "test_l1.py"])  # each in a process of its own
def test_interpreted_kernels_equal_the_formula_in_every_case_of_float32(operator):
    interpret(operator, "-k", f"triton and not bfloat16 and not float16 and {EXPONENTS}")
