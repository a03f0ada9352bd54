"""What a converted model knows of where it came from: `model.conversion`, and conversion.json beside its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formix.conversion.weight_map import Move
from formix.design import Design
from formix.design import design as find_design
from formix.environment import version_of
from formix.models.recorded import FILE, Record

CASTS = (torch.float32, torch.bfloat16, torch.float16)  # types that a model may be cast to
PACKAGES = ("formix", "torch", "timm", "transformers", "safetensors")


@dataclass(kw_only=True)
class Conversion:
    """Where a model came from, and the tensors of its source that its design has no place for.

    Those tensors are kept aside, so that converting back restores the source. `aside` holds them under formix's names,
    with the originals of tensors that were folded; `unplaced` under the source's names, as no design has a place.
    """

    source: dict[str, Any]  # class and configuration; of `formix convert` the place and checkpoint too
    source_sha256: str  # of all its tensors
    moves: list[Move]
    plan: dict[str, Any]
    aside: dict[str, Tensor] = field(default_factory=dict)
    unplaced: dict[str, Tensor] = field(default_factory=dict)
    # tensors that something was folded into -> by type, SHA-256 of what they were then
    folded: dict[str, dict[str, str]] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)  # what `formix convert` was asked for
    stages: list[dict[str, Any]] = field(default_factory=list)  # calibration and recovery, in order
    data: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    match_parts: list[str] = field(default_factory=list)  # parts of changed layers
    match_errors: dict[str, list[float]] = field(default_factory=dict)  # step -> of each part, on held-out data
    speed: list[dict[str, Any]] = field(default_factory=list)  # before and after, by input
    versions: dict[str, str | None] = field(default_factory=lambda: {name: version_of(name) for name in PACKAGES})

    @staticmethod
    def of(model: nn.Module) -> Conversion | None:
        """A model's record: its own, or the one that was beside its weights, if it is about these tensors."""
        own = getattr(model, "conversion", None)
        if isinstance(own, Conversion):
            return own
        record = getattr(model, "conversion_record", None)
        if record is None:
            return None
        plan = (conversion := Conversion.of_record(record)).plan
        known = {*plan["kept"], *plan["folded"], *(weight["name"] for weight in plan["new"])}
        fits = model.state_dict().keys() <= known and find_design(plan["design"]) == design_of(model)
        return conversion if fits else None

    def note_folded(self, model: nn.Module) -> None:
        """Remember the tensors of a model that something was folded into, as they are now."""
        state = model.state_dict()
        self.folded = {
            name: {str(dtype): sha256({name: state[name].to(dtype)}) for dtype in (state[name].dtype, *CASTS)}
            for name in self.plan["folded"]
        }

    def trained_since(self, model: nn.Module) -> set[str]:
        """The tensors that something was folded into and that have changed since, in whoever's training; a cast to
        another type, there or there and back, is no change."""
        state = model.state_dict()
        return {name for name, digests in self.folded.items() if not _is_cast(name, state[name], digests)}

    def rebuild(self) -> Any:
        """The source's own class, as its constructor initialises it."""
        if self.source.get("library") == "timm":
            from formix.conversion import timm_source

            return timm_source.rebuild(self.source)
        if self.source.get("library") == "transformers":
            from formix.conversion import transformers_source

            return transformers_source.rebuild(self.source)
        raise ValueError("This model was converted from a model of formix's, which has no class of another library.")

    def to_dict(self) -> dict[str, Any]:
        """conversion.json."""
        return {
            "source": _plain(self.source),
            "source_sha256": self.source_sha256,
            "request": self.request,
            "plan": self.plan,
            "folded": self.folded,
            "stages": self.stages,
            "data": self.data,
            "metrics": self.metrics,
            "match_parts": self.match_parts,
            "match_errors": self.match_errors,
            "speed": self.speed,
            "versions": self.versions,
            "mapping": [dataclasses.asdict(move) for move in self.moves],
        }

    def to_record(self) -> Record:
        """As it is written beside the weights."""
        aside = {f"aside.{k}": v for k, v in self.aside.items()}
        unplaced = {f"unplaced.{k}": v for k, v in self.unplaced.items()}
        return Record(text=json.dumps(self.to_dict(), indent=1, default=str) + "\n", tensors=aside | unplaced)

    @classmethod
    def of_record(cls, record: Record) -> Conversion:
        """The same again.

        Raises:
            ValueError: it is damaged.
        """
        try:
            stored, tensors = json.loads(record.text), record.tensors
            mapping = stored.pop("mapping")
            for name, digest in stored["folded"].items():
                if isinstance(digest, str):  # of an earlier version: in the model's own type alone
                    stored["folded"][name] = {str(tensors[f"aside.{name}"].dtype): digest}
            return cls(
                **stored,
                moves=[Move(**{**move, "sources": tuple(move["sources"])}) for move in mapping],
                aside={k.removeprefix("aside."): v for k, v in tensors.items() if k.startswith("aside.")},
                unplaced={k.removeprefix("unplaced."): v for k, v in tensors.items() if k.startswith("unplaced.")},
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"The model's {FILE} is damaged ({error}); convert the model again.") from None

    @classmethod
    def read(cls, directory: Path) -> Conversion:
        """The record in a directory.

        Raises:
            ValueError: it is damaged.
        """
        return cls.of_record(Record.read(directory))


def design_of(model: Any) -> Design:
    """The design of a model of formix's."""
    return find_design(model.config.design if hasattr(model, "config") else model.design)


def _is_cast(name: str, tensor: Tensor, digests: dict[str, str]) -> bool:
    """Whether a tensor is, in a type that holds all its values, what it was then."""
    for dtype in (tensor.dtype, *CASTS):
        narrow = tensor.to(dtype)
        same = dtype == tensor.dtype or torch.equal(narrow.to(tensor.dtype), tensor)
        if same and str(dtype) in digests and sha256({name: narrow}) == digests[str(dtype)]:
            return True
    return False


def sha256(state: Mapping[str, Tensor]) -> str:
    """Of names and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
