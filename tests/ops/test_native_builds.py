"""Other builds of the kernels than the installed one pass the tests of the operators: with AddressSanitizer and
UndefinedBehaviorSanitizer, and by Clang.

With sanitizers the AMX kernels have emulated tiles, whose loads and stores are seen; real ones are not, and the
emulation runs on processors without AMX too.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from formix.ops import native

ROOT = Path(__file__).resolve().parents[2]
ISA = "amx_emulated"  # and portable; the others are their code at another vector length
CASES = (
    "((test_pointwise_cases or test_l1) and three_threads or test_empty or test_inputs_are_not_copied)"
    " and not (amx_emulated and more_than_the_cache_holds)"  # which takes a minute
)


def _cmake() -> str | None:
    beside = Path(sysconfig.get_path("scripts")) / "cmake"
    return str(beside) if beside.exists() else shutil.which("cmake")


def _runtimes() -> list[str]:
    """GCC's sanitizer runtimes, which must be in the process before Python's own libraries."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        answer = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(answer):
            return []
        found.append(answer)
    return found


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_cmake() is None, reason="needs cmake (pip install cmake)"),
]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the runtimes are preloaded as Linux does it")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_operators_under_sanitizers(tmp_path):
    if not (runtimes := _runtimes()):
        pytest.skip("this g++ has no AddressSanitizer and UndefinedBehaviorSanitizer")
    library = _build(
        tmp_path, "g++", "-DFORMIX_SANITIZE=address,undefined", "-DFORMIX_AMX_EMULATED=ON", f"-DFORMIX_ISAS={ISA}"
    )
    output = _test(
        library,
        LD_PRELOAD=" ".join(runtimes),
        ASAN_OPTIONS="detect_leaks=0",  # Python and PyTorch keep what they have until they end
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
    )
    assert "test_pointwise_cases[portable" in output
    if native.isas().get("avx512_bf16") == "":
        assert "test_pointwise_cases[amx_emulated" in output


@pytest.mark.skipif(not shutil.which("clang++"), reason="needs clang++")
def test_operators_by_clang(tmp_path):
    output = _test(_build(tmp_path, "clang++"))
    for isa, reason in native.isas().items():
        assert reason or f"test_pointwise_cases[{isa}" in output, isa


def _build(directory, compiler, *options):
    _run([_cmake(), "-S", str(ROOT), "-B", str(directory), f"-DCMAKE_CXX_COMPILER={compiler}", *options])
    _run([_cmake(), "--build", str(directory), "--parallel", "2"])
    return directory / "formix_native.so"


def _test(library, **environment):
    return _run(
        [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-k", CASES, "tests/ops/test_native.py"],
        {**os.environ, "FORMIX_NATIVE": str(library), **environment},
    )


def _run(command, environment=None):
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout
