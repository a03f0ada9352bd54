"""How fast a converted model is against its source's own class, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formix.benchmarks.measure import Measurable
from formix.models.image import image_size

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ConvertedCase(Measurable):
    """A forward pass in inference of "converted", the model in `directory`, and of "softmax", the class of timm's or
    transformers' that it was converted from. Inputs are random and without padding."""

    directory: str  # written by `formix convert`
    tokens: int | None = None  # of a text; None: the model reads images
    img_size: int | None = None  # side of the image; None: the model's own
    batch: int = 1
    precision: str = "bfloat16"  # of weights and inputs
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}.")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; it must be 1 or more.")

    @property
    def name(self) -> str:
        """Unique among the cases of a run."""
        size = f"{self.img_size or 'own'} pixels" if self.tokens is None else f"N={self.tokens}"
        return f"{self.directory} forward {self.precision} B={self.batch} {size}{self.place}"

    def models(self) -> dict[str, Any]:
        """Contender -> model."""
        from formix import load
        from formix.conversion import restore

        converted = load(self.directory)
        return {"softmax": restore(converted), "converted": converted}

    def calls(self) -> dict[str, Callable[[], object]]:
        """Contender -> what is timed."""
        dtype = getattr(torch, self.precision)
        models = self.models()
        inputs = self._inputs(models["converted"], dtype)
        return {name: partial(_forward, model.to(self.device, dtype).eval(), inputs) for name, model in models.items()}

    def flops(self, contender: str) -> int | None:
        """Operations of one call; None for the source's class, whose attention the counter does not see."""
        from formix.conversion.planning import operations

        if contender == "softmax":
            return None
        model = self.models()[contender]
        return operations(model, self._inputs(model, next(model.parameters()).dtype))

    def _inputs(self, model: Any, dtype: torch.dtype) -> dict[str, Tensor] | Tensor:
        if self.tokens is not None:
            from formix.models.text import as_choices, positions

            room = positions(model.config)
            if room is not None and self.tokens > room:
                raise ValueError(f"tokens is {self.tokens}; {self.directory} has {room} positions: give no more.")
            return as_choices(
                model, {"input_ids": torch.randint(0, model.config.vocab_size, (self.batch, self.tokens))}
            )
        size: Any = image_size(model) if self.img_size is None else (self.img_size, self.img_size)
        patch = model.patch_embed.patch_size
        if isinstance(patch, tuple) and any(side % part for side, part in zip(size, patch, strict=True)):
            raise ValueError(
                f"img_size is {self.img_size}; {self.directory} has patches of {patch[0]} x {patch[1]}; give multiples."
            )
        return torch.randn(self.batch, model.in_chans, *size).to(dtype)


def converted_cases(
    directory: str,
    *,
    tokens: Sequence[int],
    img_sizes: Sequence[int | None],
    batch: int,
    precision: str,
    device: str = "cpu",
) -> list[ConvertedCase]:
    """Cases of one directory: every number of `tokens` for a text model, every size for an image model.

    Raises:
        ValueError: the directory holds no model that `formix convert` made.
    """
    from formix.models.directory import read_config
    from formix.models.recorded import FILE

    config = read_config(Path(directory))
    if not (Path(directory) / FILE).is_file():
        raise ValueError(f"{directory} has no {FILE}; give a directory that formix convert has written.")
    common: dict[str, Any] = {"directory": directory, "batch": batch, "precision": precision, "device": device}
    if "architecture" in config:
        return [ConvertedCase(img_size=size, **common) for size in img_sizes]
    return [ConvertedCase(tokens=count, **common) for count in tokens]


@torch.inference_mode()
def _forward(model: Any, inputs: dict[str, Tensor] | Tensor) -> object:
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
