"""The shared library of CPU kernels (native/): found, loaded, and its instruction sets."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

NAME = "formix_native.so"

_log = logging.getLogger("formix")


@dataclass(frozen=True)
class Structure:
    """One of native/formix.h: how its numbers are packed, and where, in words of eight bytes, its addresses stand."""

    struct: struct.Struct
    addresses: tuple[int, ...]  # of query, key, value, output, mask, and the gradients of output, query, key and value

    @classmethod
    def of(cls, *parts: str) -> Structure:
        starts = [struct.calcsize("@" + "".join(parts[:i])) // 8 for i, part in enumerate(parts) if part[0] == "P"]
        return cls(struct.Struct("@" + "".join(parts)), tuple(starts))


_TENSORS, _MASK = ("P3q",) * 4, "P4q"  # struct.pack formats
POINTWISE = Structure.of("12q2d", *_TENSORS, _MASK, *_TENSORS)
L1 = Structure.of("8qd", *_TENSORS, _MASK, "q", *_TENSORS)


class UnavailableError(RuntimeError):
    """The kernels cannot be used at all; the message says why."""


@functools.cache
def _loaded() -> ctypes.CDLL | UnavailableError:
    path = _path()
    if path is None:
        return UnavailableError(
            f"{NAME} is not in this installation of formix: it was installed without a C++17 compiler "
            "(install one, for example g++, and reinstall formix)"
        )
    import torch  # noqa: F401  (its OpenMP runtime must be in the process before the kernels look for one)

    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return UnavailableError(f"{path} cannot be loaded: {error}")
    if not hasattr(library, "formix_use_threads"):
        return UnavailableError(f"{path} is not of this version of formix: reinstall formix")
    if library.formix_use_threads():  # a torch without OpenMP: let the kernels have the system's
        with contextlib.suppress(OSError):
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        if library.formix_use_threads():
            _log.warning("There is no OpenMP runtime here (libgomp or libomp): the CPU kernels run on one thread.")
    for name in ("formix_isa", "formix_isa_name", "formix_isa_reason"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("pointwise_forward", "pointwise_backward", "l1_forward", "l1_backward"):
        getattr(library, f"formix_{name}").argtypes = [ctypes.c_void_p]
    wanted = os.environ.get("FORMIX_ISA") or "auto"
    if library.formix_set_isa(wanted.encode()):
        known = {**_isas(library), "auto": ""}
        why = known.get(wanted, f"the names are {', '.join(known)}")
        refused = UnavailableError(f"FORMIX_ISA={wanted} cannot be used: {why}")
        _log.warning("%s. Attention runs as plain PyTorch.", refused)  # asked for, so not in silence
        return refused
    return library


def _path() -> Path | None:
    if given := os.environ.get("FORMIX_NATIVE"):  # another build, for example with sanitizers
        return Path(given)
    # an editable install keeps the library beside its own record of the package, not in the source tree
    for directory in sys.modules["formix"].__path__:
        path = Path(directory) / NAME
        if path.exists():
            return path
    return None


def _isas(library: ctypes.CDLL) -> dict[str, str]:
    return {
        library.formix_isa_name(i).decode(): library.formix_isa_reason(i).decode()
        for i in range(library.formix_isa_count())
    }


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        UnavailableError: it is not installed or cannot run here.
    """
    loaded = _loaded()
    if isinstance(loaded, UnavailableError):
        raise loaded
    return loaded


def available() -> tuple[bool, str]:
    """(True, the instruction set in use), or (False, the reason in one sentence)."""
    loaded = _loaded()
    return (False, str(loaded)) if isinstance(loaded, UnavailableError) else (True, loaded.formix_isa().decode())


class _Python(ctypes.Structure):  # FormixPython
    _functions = ("PyEval_SaveThread", "PyEval_RestoreThread", "Py_IncRef", "PyErr_SetString", "PyErr_Clear")
    _fields_ = [(name, ctypes.c_void_p) for name in ("exchange", *_functions, "none", "memory_error")]


@functools.cache
def library_on_tensors() -> ctypes.PyDLL | None:
    """The library once more, for its functions that take PyTorch's tensors and hold Python's global lock. None where
    PyTorch does not let C look into its tensors (before 2.10), or the kernels cannot be used."""
    import torch

    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or isinstance(_loaded(), UnavailableError):
        return None
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    table = _Python(exchange=pointer(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api"))
    for name in _Python._functions:
        setattr(table, name, ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p))
    table.none, table.memory_error = id(None), id(MemoryError)
    functions = ctypes.PyDLL(library()._name)
    if functions.formix_use_python(ctypes.byref(table)):
        return None
    address, tensor = ctypes.c_void_p, ctypes.py_object
    inputs = address, tensor, tensor, tensor, tensor
    for name, result, arguments in (
        ("keep", address, (*inputs, tensor, address, ctypes.c_char_p, ctypes.c_int64, address)),
        ("find", address, inputs),
        ("repeat", tensor, inputs),
        ("forget", None, (address,)),
    ):
        function = getattr(functions, f"formix_{name}")
        function.restype, function.argtypes = result, arguments
    return functions


def isas() -> dict[str, str]:
    """Every instruction set that formix has kernels for, best first -> "" if it runs here, else why not."""
    loaded = _loaded()
    return {} if isinstance(loaded, UnavailableError) else _isas(loaded)


def set_isa(name: str) -> None:
    """Uses the kernels of one instruction set from now on in this process; "auto" is the best one.

    Raises:
        ValueError: it cannot run here.
    """
    if library().formix_set_isa(name.encode()):
        why = isas().get(name, f"the names are {', '.join(isas())} and auto")
        raise ValueError(f"The kernels for {name!r} cannot be used: {why}.")
