"""Whole models and single blocks as cases: images or sequences per second in inference and in a training step, against
the softmax model of the library that the trunk is from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formix.benchmarks.flops import count_flops
from formix.benchmarks.measure import Measurable
from formix.benchmarks.profile import profile_parts
from formix.design import design as find_design
from formix.layers import Block
from formix.models.parts import layers

BASELINE = "softmax"
PRECISIONS = ("float32", "bfloat16", "autocast")


@dataclass(frozen=True, kw_only=True)
class ModelCase(Measurable):
    """One model in several designs. The contender `softmax` is timm's own model where the name is one of timm's, else
    formix's in the design softmax (which runs PyTorch's fused attention as transformers does).

    `precision`: "bfloat16" has weights and inputs in bfloat16, "autocast" weights in float32.
    A training step is forward, cross-entropy or the model's own loss, backward and AdamW (fused).
    """

    model: str = "vit_small_patch8_224"
    designs: tuple[str, ...] = ("relu",)
    batch: int = 8
    tokens: int = 128  # of a text
    precision: str = "bfloat16"
    training: bool = False
    model_args: dict[str, Any] = field(default_factory=dict)
    profiled: bool = False  # also where the time goes
    device: str = "cpu"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def name(self) -> str:
        """Unique among the cases of a run."""
        what = "training step" if self.training else "forward"
        return f"{self.model} {'+'.join(self.designs)} {what} {self.precision} B={self.batch}{self.place}"

    def models(self) -> dict[str, nn.Module]:
        """Contender -> model, all of the same trunk."""
        return {BASELINE: _baseline(self.model, self.model_args)} | {
            design: _create(self.model, design, self.model_args) for design in self.designs
        }

    def calls(self) -> dict[str, Callable[[], object]]:
        """Contender -> what is timed."""
        ready = self._ready()
        for model in ready.values() if self.profiled else ():
            layers(model)  # what cannot be profiled is refused before minutes of timing
        return {name: _call(model, self) for name, model in ready.items()}

    def flops(self, contender: str) -> int | None:
        """Operations of one call; a training step counts as three forward passes, as is usual."""
        model = dict(self.models())[contender]
        if contender == BASELINE:
            model = _create(self.model, BASELINE, self.model_args)  # the counter knows formix's attention
        return count_flops(model, self._inputs(model, torch.float32)) * (3 if self.training else 1)

    def profile(self) -> dict[str, dict[str, float]]:
        """Contender -> part -> seconds of one call."""
        if not self.profiled:
            return {}
        return {name: profile_parts(model, _call(model, self)) for name, model in self._ready().items()}

    def _ready(self) -> dict[str, nn.Module]:
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        return {name: model.to(dtype).train(self.training) for name, model in self.models().items()}

    def _inputs(self, model: Any, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        if hasattr(model, "patch_embed"):
            size = model.patch_embed.img_size
            return torch.randn(self.batch, model.pretrained_cfg.get("input_size", (3,))[0], *size).to(dtype)
        ids = torch.randint(0, model.config.vocab_size, (self.batch, self.tokens))
        return {"input_ids": ids}


@dataclass(frozen=True, kw_only=True)
class BlockCase(Measurable):
    """One block in several designs on random tokens; the contender `softmax` is formix's block with PyTorch's fused
    softmax attention."""

    designs: tuple[str, ...] = ("relu",)
    tokens: int = 785
    batch: int = 8
    dim: int = 384
    heads: int = 6
    mlp_ratio: float = 4.0
    precision: str = "bfloat16"
    training: bool = False
    profiled: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def name(self) -> str:
        """Unique among the cases of a run."""
        what = "forward + backward" if self.training else "forward"
        shape = f"B={self.batch} N={self.tokens} C={self.dim} H={self.heads}"
        return f"block {'+'.join(self.designs)} {what} {self.precision} {shape}{self.place}"

    def models(self) -> dict[str, nn.Module]:
        """Contender -> block."""
        return {
            design: Block(self.dim, self.heads, mlp_ratio=self.mlp_ratio, qkv_bias=True, design=design)
            for design in dict.fromkeys((BASELINE, *self.designs))
        }

    def calls(self) -> dict[str, Callable[[], object]]:
        """Contender -> what is timed."""
        return {name: self._call(block) for name, block in self._ready().items()}

    def flops(self, contender: str) -> int | None:
        """Operations of one call; with the backward pass three times the forward ones, as is usual."""
        x = torch.randn(self.batch, self.tokens, self.dim)
        return count_flops(self.models()[contender], x) * (3 if self.training else 1)

    def profile(self) -> dict[str, dict[str, float]]:
        """Contender -> part -> seconds of one call."""
        if not self.profiled:
            return {}
        return {name: profile_parts(block, self._call(block)) for name, block in self._ready().items()}

    def _ready(self) -> dict[str, nn.Module]:
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        return {name: block.to(dtype).train(self.training) for name, block in self.models().items()}

    def _call(self, block: nn.Module) -> Callable[[], object]:
        dtype = next(block.parameters()).dtype
        x = torch.randn(self.batch, self.tokens, self.dim).to(dtype).requires_grad_(self.training)
        grad = torch.randn(self.batch, self.tokens, self.dim)

        def call() -> object:
            with torch.set_grad_enabled(self.training), _autocast(self):
                out = block(x)
            if self.training:
                out.backward(grad.to(out.dtype))
            return out

        return call


def _check(case: ModelCase | BlockCase) -> None:
    if case.precision not in PRECISIONS:
        raise ValueError(f"precision is {case.precision!r}; it must be one of {', '.join(PRECISIONS)}.")
    if case.profiled and case.device != "cpu":
        raise ValueError(
            f"device is {case.device!r}, and profile tells where the CPU's time goes; leave one of them out."
        )
    for name in case.designs:
        find_design(name)


@functools.cache
def _image_names() -> frozenset[str]:
    import timm

    return frozenset(timm.list_models())


def _baseline(name: str, args: dict[str, Any]) -> nn.Module:
    import timm

    if name in _image_names() and not name.startswith(("sima_", "formix_")):
        return timm.create_model(name, **_with_head(name, args))
    return _create(name, BASELINE, args)


def _create(name: str, design: str, args: dict[str, Any]) -> nn.Module:
    from formix.models import create_model

    return create_model(name, design=design, **_with_head(name, args))


def _with_head(name: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"num_classes": 1000, **args} if name in _image_names() else args


def _call(model: nn.Module, case: ModelCase) -> Callable[[], object]:
    inputs = case._inputs(model, next(model.parameters()).dtype)
    if not case.training:

        @torch.inference_mode()
        def forward() -> object:
            with _autocast(case):
                return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)

        return forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    labels = torch.randint(0, 10, (case.batch,)) if isinstance(inputs, Tensor) else inputs["input_ids"]

    def step() -> None:
        with _autocast(case):
            if isinstance(inputs, Tensor):
                loss = F.cross_entropy(model(inputs), labels)
            else:
                loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _autocast(case: ModelCase | BlockCase) -> contextlib.AbstractContextManager[Any]:
    if case.precision != "autocast":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(case.device).type, torch.bfloat16)
