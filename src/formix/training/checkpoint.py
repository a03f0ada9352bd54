"""Checkpoints on disk: complete or absent, checked before they are used, and nothing in them is executed.

    DIRECTORY/step-000001200/
        manifest.json            every other file with its size and SHA-256
        state.json               where the run is, and what it is a run of
        random/0.json ...        every process's random states
        training/*.safetensors   weights, optimiser and averages, written by torch.distributed.checkpoint in shards
        model/                   the model as `formix.save` writes it

A checkpoint is written under a name that begins with a dot, synced, and renamed when it is complete. The format has no
pickle: torch.distributed.checkpoint keeps one in its usual `.metadata`, so its safetensors storage is used instead,
which has the shards' places in the files' own headers. All processes must see the same DIRECTORY.

A checkpoint that turns out to be damaged, or that a run diverges from again, is renamed to aside-step-..., so that it
is neither gone on from nor counted among those that are kept; at most `keep` of those stay too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils import is_torch_version
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from formix.models import save as save_model
from formix.training.parallel import from_first, process_count, together

_log = logging.getLogger("formix")
MANIFEST, STATE, PARTIAL, ASIDE = "manifest.json", "state.json", ".partial-", "aside-"
Document = dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they are; made if it is not there.
        keep: how many of the newest stay, beside the best on validation.
        minutes: how often one is written, besides those at evaluations and at the end; 0: never.
        steps: the same in optimiser steps, for runs that must be cut at known places.
        identity: what the run is a run of; only a run with the same may go on from its checkpoints. The loop adds its
            own configuration.
        write_model: writes the model in `model/`.

    Raises:
        ValueError: a number outside its range, or a PyTorch before 2.9, whose storage for them is another.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        minutes: float = 10.0,
        steps: int = 0,
        identity: Document | None = None,
        write_model: Callable[[nn.Module, str | Path], None] = save_model,
    ) -> None:
        for name, value, least in (("keep", keep, 1), ("minutes", minutes, 0), ("steps", steps, 0)):
            if not least <= value < float("inf"):
                raise ValueError(f"{name} of checkpoints is {value}; it must be {least} or more.")
        if is_torch_version("<", "2.9"):
            raise ValueError(
                f"Checkpoints of training need PyTorch 2.9 or later, and this is {torch.__version__}; update it, or "
                "train without checkpoints as formix compare does."
            )
        self.directory, self.keep, self.minutes, self.steps = Path(directory), keep, minutes, steps
        self.identity, self.write_model = identity or {}, write_model
        self._written = time.monotonic()
        self.latest: Path | None = None  # the newest that is known to be intact

    def open(self) -> Path | None:
        """The newest intact checkpoint, None if there is none yet; remains of interrupted writing are removed.

        Damaged ones that are newer are renamed (`ASIDE`).

        Raises:
            ValueError: a directory that cannot be written to, or checkpoints of which none is intact.
        """

        def choose() -> None:
            self._clear()
            self.latest = self._newest()

        together(choose, first_only=True, otherwise=f"{self.directory} cannot be used for checkpoints")
        self.latest = from_first(self.latest)
        if self.latest is None and (found := from_first(self._found())):
            raise ValueError(
                f"None of the {len(found)} checkpoints in {self.directory} is intact; restore one from a copy, or "
                "remove them to begin again."
            )
        return self.latest

    def retreat(self) -> None:
        """Set the latest aside and take the newest intact one before it; the latest stays if there is none.

        Raises:
            ValueError: it cannot be renamed.
        """

        def choose() -> None:
            self.latest = self._newest(spoilt=self.latest) or self.latest

        together(choose, first_only=True, otherwise=f"{self.latest} cannot be renamed")
        self.latest = from_first(self.latest)

    def due(self, step: int) -> bool:
        """Whether it is time for the next one, by this process's clock."""
        by_time = self.minutes > 0 and time.monotonic() - self._written > 60 * self.minutes
        return by_time or (self.steps > 0 and step % self.steps == 0)

    def write(
        self, step: int, state: Document, random: Document, tensors: dict[str, Tensor], model: Callable[[Path], None]
    ) -> None:
        """Write the checkpoint of a step; called on every process, with its own random state and shards.

        Raises:
            ValueError: it could not be written; earlier checkpoints are as they were.
        """
        partial, final = self.directory / f"{PARTIAL}{step:09d}", self.directory / f"step-{step:09d}"
        kept = f"the checkpoint {self.latest.name} before it is intact" if self.latest else "there is none before it"
        failed = f"The checkpoint of step {step} could not be written to {self.directory}, {kept}"
        process = process_count()[0]

        def parts() -> None:
            _write_json(partial / "random" / f"{process}.json", random)
            with warnings.catch_warnings(action="ignore"):  # that a single process saves alone
                storage = dcp.HuggingFaceStorageWriter(str(partial / "training"), save_distributed=True)
                dcp.save(tensors, storage_writer=storage, no_dist=not dist.is_initialized())

        def close() -> None:
            _write_json(partial / STATE, state)
            files = {}
            for path in sorted(p for p in partial.rglob("*") if p.is_file()):
                files[path.relative_to(partial).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                _sync(path)
            _write_json(partial / MANIFEST, {"files": files})
            _sync(partial / MANIFEST)
            for folder in (*(p for p in partial.rglob("*") if p.is_dir()), partial):
                _sync(folder)
            _remove(final)  # the same step again, after a return to an earlier one
            os.replace(partial, final)
            _sync(self.directory)

        try:
            together(lambda: self._begin(partial), first_only=True, otherwise=failed)
            together(parts, otherwise=failed)
            with _no_bar():
                together(lambda: model(partial / "model"), otherwise=failed)
            together(close, first_only=True, otherwise=failed)
        except ValueError:
            if process == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.latest, self._written = final, time.monotonic()
        if process == 0:
            self._prune()

    def read_state(self, path: Path) -> tuple[Document, Document | None]:
        """The state, and this process's random state if the run had such a process.

        Raises:
            ValueError: the checkpoint is of another run; the fields that differ are named.
        """
        state = json.loads((path / STATE).read_text())
        if changed := difference(state["identity"], self.identity):
            name, theirs, mine = changed
            raise ValueError(
                f"{path} is of a run with {name} {theirs} and this one has {name} {mine}; "
                "give the same, or begin in another directory."
            )
        random = path / "random" / f"{process_count()[0]}.json"
        same = state["processes"] == process_count()[1]
        return state, json.loads(random.read_text()) if same else None

    def stored_tensors(self, path: Path) -> dict[str, tuple[int, ...]]:
        """Names and whole shapes of the tensors in a checkpoint."""
        metadata: Any = dcp.HuggingFaceStorageReader(str(path / "training")).read_metadata()
        return {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}

    def read_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Fill the tensors from a checkpoint, whole or their shards, however many processes wrote it.

        Raises:
            ValueError: it lacks one of them or has it in another shape.
        """
        reader = dcp.HuggingFaceStorageReader(str(path / "training"))

        def read() -> None:
            with warnings.catch_warnings(action="ignore"):
                dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())

        together(read, otherwise=f"The checkpoint {path} does not fit this model")

    def _clear(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for remains in self.directory.glob(PARTIAL + "*"):
            shutil.rmtree(remains)
        probe = self.directory / f"{PARTIAL}probe"
        probe.mkdir()
        probe.rmdir()

    def _begin(self, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "random").mkdir(parents=True)

    def _found(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"), reverse=True)

    def _newest(self, spoilt: Path | None = None) -> Path | None:
        """The newest that is intact and not `spoilt`; what is newer is set aside, unless there is none."""
        problems: dict[Path, str] = {}
        for path in self._found():
            problem = "the run diverged from it again" if path == spoilt else damage(path)
            if problem is None:
                for useless, problem in problems.items():
                    kept = self._set_aside(useless).name
                    _log.warning("%s is set aside as %s: %s; %s is used.", useless, kept, problem, path)
                return path
            problems[path] = problem
        return None

    def _set_aside(self, path: Path) -> Path:
        """Take a checkpoint out of the numbering; at most `keep` of those stay."""
        kept = path.with_name(ASIDE + path.name)
        _remove(kept)
        os.replace(path, kept)
        for older in sorted(self.directory.glob(f"{ASIDE}*"), reverse=True)[self.keep :]:
            _remove(older)
        return kept

    def _prune(self) -> None:
        """Remove all but the newest and the best."""
        found = self._found()
        scores = {path: score for path in found if (score := _score(path)) is not None}
        best = max(scores, key=lambda path: (scores[path], path.name), default=None)
        for path in found[self.keep :]:
            if path != best:
                _remove(path)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if they are those that were written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    found = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file() or p.is_symlink()}
    found.pop(MANIFEST, None)
    for name in sorted(expected.keys() ^ found.keys()):
        return f"{name} is missing" if name in expected else f"{name} was not written with it"
    for name, (size, digest) in expected.items():
        try:
            if (bytes_now := found[name].stat().st_size) != size:
                return f"{name} has {bytes_now} bytes instead of {size}"
            if _sha256(found[name]) != digest:
                return f"{name} has been altered"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _score(path: Path) -> float | None:
    """A checkpoint's metric on validation, the more the better; None where it has none that is a finite number."""
    try:
        state = json.loads((path / STATE).read_text())
        score = float(state["validation"]) * (1 if state["higher_is_better"] else -1)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return score if math.isfinite(score) else None


def difference(theirs: Any, mine: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first field that differs: its name, their value, mine."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in (*theirs, *(k for k in mine if k not in theirs)):
            inside = f"{name}.{key}" if name else key
            if found := difference(theirs.get(key), mine.get(key), inside):
                return found
        return None
    return None if theirs == mine else (name, theirs, mine)


def _remove(path: Path) -> None:
    """Remove a checkpoint; first its name, so that a half removed one is never taken for one."""
    if path.exists():
        trash = path.with_name(f"{PARTIAL}removed-{path.name}")
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """transformers shows a bar at every save, across the one of the run."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _write_json(path: Path, content: Document) -> None:
    path.write_text(json.dumps(content) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
