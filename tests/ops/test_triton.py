"""The Triton kernels without a GPU: compiled for some, and run in Triton's interpreter.

The interpreter has to be chosen before the kernels are defined, so it runs in a process of its own: the tests of
test_pointwise.py and test_l1.py, which there find one implementation more.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, compile  # noqa: E402

HERE = Path(__file__).parent
SHARED = 99 * 1024  # bytes of a program on compute capability 8.6, the least from 8.0 on
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
POINTWISE = ("forward_kernel", "key_gradient_kernel", "query_gradient_kernel")
INTERPRETED = ("blind_rows-float32", "grouped_causal_mask-float16", "causal_padding-float32", "rows_without",
               "head_size_13", "packed_projection", "causal_more", "wider_values", "no_keys",
               "autocast")  # fmt: skip
TABLES = ("NUMBERS", "NORM", "PRODUCT", "W", "U")  # float32 whatever the inputs are


def compiled(kernel, dtype, constants, target):
    """`kernel` for a device that is not here."""
    options = {name: constants[name] for name in ("num_warps", "num_stages")}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("scale", "number"):
            signature[name] = "fp32"
        elif name == "MASK":
            signature[name] = "*u8"
        elif name in TABLES:
            signature[name] = "*fp32"
        else:
            pointer = name in ("Q", "K", "V", "OUT", "DO", "DQ", "DK", "DV", "X", "Y", "Z")
            signature[name] = f"*{TYPES[dtype]}" if pointer else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*"}
    return compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)


def pointwise_constants(dtype, d, activation="gelu", rows=False, backward=True):
    from formix.ops.triton_pointwise import blocks, precision

    return {
        "D": d, "D_V": d, "ACTIVATION": activation, "CAUSAL": rows, "MASKED": rows, "UNIFORM": not rows,
        "PRECISION": precision(dtype), **blocks(dtype, d, d, backward),
    }  # fmt: skip


FAST = (("forward_kernel", 128, torch.float16), ("key_gradient_kernel", 64, torch.bfloat16))
ALL = [
    pytest.param(
        name, d, dtype, id=f"{name}-{d}-{TYPES[dtype]}", marks=() if (name, d, dtype) in FAST else pytest.mark.slow
    )
    for name in POINTWISE
    for d, dtype in ((64, torch.bfloat16), (128, torch.float16), (256, torch.float32))
]


@pytest.mark.parametrize(("name", "d", "dtype"), ALL)
def test_pointwise_kernels_compile_and_fit_into_shared_memory(name, d, dtype):
    from formix.ops import triton_pointwise

    constants = pointwise_constants(dtype, d, rows=d == 64, backward=name != "forward_kernel")
    kernel = compiled(getattr(triton_pointwise, name), dtype, constants, GPUTarget("cuda", 86, 32))
    assert "cubin" in kernel.asm
    assert 0 < kernel.metadata.shared <= SHARED


@pytest.mark.parametrize("dtype", [pytest.param(d, id=name) for d, name in TYPES.items()])
@pytest.mark.parametrize("name", ["sum_kernel", "apply_kernel"])
def test_l1_kernels_compile_and_fit_into_shared_memory(name, dtype):
    from formix.ops import triton_l1
    from formix.ops.triton_pointwise import precision

    constants = {
        "D": 64, "D_V": 64, "MASKED": True, "WITH_PRODUCT": True, "WITH_SIGN": True, "PRECISION": precision(dtype),
        "BLOCK_D": 64, "BLOCK_V": 64, **triton_l1.TILES,
    }  # fmt: skip
    kernel = compiled(getattr(triton_l1, name), dtype, constants, GPUTarget("cuda", 86, 32))
    assert "cubin" in kernel.asm
    assert 0 < kernel.metadata.shared <= SHARED


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
def test_interpreted_kernels_equal_the_formula():
    interpret("test_pointwise.py", "test_l1.py", "-k", f"triton and ({' or '.join(INTERPRETED)})")


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["test_pointwise.py", "test_l1.py"])  # each in a process of its own
def test_interpreted_kernels_equal_the_formula_in_every_case_of_float32(operator):
    interpret(operator, "-k", "triton and not bfloat16 and not float16")
