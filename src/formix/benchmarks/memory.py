"""How much memory a call needs at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def peak_growth(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes by which `call` raises the resident memory of this process at its peak; None where the system does not say
    (it takes Linux's /proc). What earlier calls left allocated is not counted again. With a CUDA `device`, the bytes of
    tensors there."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - held
    reset = Path("/proc/self/clear_refs")
    if not sys.platform.startswith("linux") or not reset.exists():
        return None
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        reset.write_text("5")  # sets the peak to what is resident now
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def peak_resident() -> int:
    """Bytes resident at this process's peak, with all it holds. On Linux not `ru_maxrss`, which a process inherits: it
    begins with what the one that started it had."""
    if sys.platform.startswith("linux") and Path("/proc/self/status").exists():
        return _status("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")
