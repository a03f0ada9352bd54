"""Where something was measured: versions, processor, threads."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The software and the machine of a measurement."""

    formix: str  # version
    python: str  # version
    torch: str  # version
    timm: str | None = None  # version; null when the task does not use it
    transformers: str | None = None  # version; null when the task does not use it
    cpu: str  # the processor's model name
    instruction_set: str  # what PyTorch's kernels use, e.g. "AVX512", and the GPU where there is one
    threads: int  # threads PyTorch computes with
    platform: str  # operating system and architecture
    commit: str | None = None  # git commit of formix, when it runs from a checkout


def capture_environment() -> Environment:
    """The environment of this process, as the report shows it."""
    return Environment(
        formix=metadata.version("formix"),
        python=platform.python_version(),
        torch=torch.__version__,
        timm=version_of("timm"),
        transformers=version_of("transformers"),
        cpu=_processor(),
        instruction_set=instruction_set(),
        threads=torch.get_num_threads(),
        platform=platform.platform(),
        commit=_commit(Path(__file__)),
    )


def instruction_set() -> str:
    """The vector instructions that PyTorch uses here, those that multiply bfloat16, and the GPU, on which training and
    comparisons run where there is one."""
    names = [torch.backends.cpu.get_cpu_capability()]
    if torch.cpu._is_avx512_bf16_supported():
        names.append("AVX512-BF16")
    if torch.cpu._is_amx_tile_supported():
        names.append("AMX")
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    return " + ".join(names)


def version_of(package: str) -> str | None:
    """Of an installed package; None for one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit(file: Path) -> str | None:
    """The commit of the checkout that the file is of; None where it lies in another repository without being part of
    it, as an installation in some project's folder does."""
    file = file.resolve()
    asked = ["git", "-C", str(file.parent), "rev-parse", "HEAD", f"HEAD:./{file.name}"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout[:12] if answer.returncode == 0 else None
