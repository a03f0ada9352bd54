"""Attention operators as cases: formix's, PyTorch's fused softmax, the forms as usually written, and the matrix product
that none of them can beat.

All contenders of a case get the same tensors: query, key and value are [B, H, N, D] views of one packed [B, N, 3, H, D]
projection (layout "packed", which is what a model has) or three contiguous tensors ("contiguous"); the gradient of the
output lies in memory as [B, N, H, D], as the output projection's backward leaves it. formix and PyTorch's fused softmax
both write their output in that order.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from formix.benchmarks.measure import Measurable
from formix.benchmarks.results import CEILING
from formix.design import Mixer, Pointwise, Sima, design
from formix.layers.attend import attend
from formix.ops import native
from formix.ops.pointwise import ACTIVATIONS

Call = Callable[[], object]
Operator = Callable[[Tensor, Tensor, Tensor], Tensor]
BASELINES = ("softmax", "naive", "compiled", CEILING)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Measurable):
    """One shape, and the designs and baselines that are timed on it.

    Contenders are named `relu` (the design on formix's kernels), `relu, avx2` (held to an instruction set),
    `relu, naive` (plain PyTorch; for SimA its official code), `relu, compiled` (torch.compile of the plain form; for
    SimA of the fused identity), `softmax` and `matmul`.
    """

    designs: tuple[str, ...] = ("relu",)
    baselines: tuple[str, ...] = ("softmax", CEILING)
    isas: tuple[str, ...] = ()  # the first design on these instruction sets of formix too
    tokens: int = 785
    batch: int = 2
    heads: int = 6
    head_size: int = 64
    dtype: str = "bfloat16"
    backward: bool = False
    causal: bool = False
    layout: Literal["packed", "contiguous"] = "packed"
    only: str | None = None  # an instruction set to which this whole process is held, PyTorch as well
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in self.designs:
            mixer = mixer_of(name)
            if self.causal and isinstance(mixer, Sima):
                raise ValueError(f"design {name!r} cannot be causal: SimA's norms run over all tokens.")
        for name in ("tokens", "batch", "heads", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")
        if unknown := [name for name in self.baselines if name not in BASELINES]:
            raise ValueError(f"baselines has {unknown[0]!r}; it may have {', '.join(BASELINES)}.")
        if self.isas and self.device != "cpu":
            raise ValueError(f"isas has {self.isas[0]!r}, which is of the CPU, and device is {self.device!r}.")
        if (
            "compiled" in self.baselines
            and self.device == "cpu"
            and not any(map(shutil.which, ("c++", "g++", "clang++")))
        ):
            raise ValueError("baselines has 'compiled', and torch.compile finds no C++ compiler here: leave it out.")
        for isa in self.isas:
            if reason := native.isas().get(isa, f"the names are {', '.join(native.isas()) or 'none: no kernels'}"):
                raise ValueError(f"isas has {isa!r}, which cannot be used: {reason}.")

    @property
    def name(self) -> str:
        """Unique among the cases of a run."""
        words = [
            "+".join(self.designs),
            *(["causal"] if self.causal else []),
            "forward + backward" if self.backward else "forward",
            self.dtype,
            f"B={self.batch} H={self.heads} N={self.tokens} D={self.head_size}{self.place}",
            *([f"on {self.only}"] if self.only else []),
            *([self.layout] if self.layout != "packed" else []),
        ]
        return " ".join(words)

    def calls(self) -> dict[str, Call]:
        """Contender -> what is timed."""
        q, k, v = inputs = self._inputs()
        grad = torch.randn(self.batch, self.tokens, self.heads, self.head_size).to(q.dtype).transpose(1, 2)

        def timed(operator: Operator) -> Call:
            if not self.backward:
                return lambda: operator(q, k, v)
            return lambda: torch.autograd.grad(operator(*inputs), inputs, grad)

        calls: dict[str, Call] = {}
        for name in self.designs:
            mixer = mixer_of(name)
            fused = functools.partial(attend, mixer, is_causal=self.causal)
            calls[name] = timed(fused)
            if "naive" in self.baselines:
                calls[f"{name}, naive"] = timed(functools.partial(plain(mixer), causal=self.causal))
            if "compiled" in self.baselines:
                calls[f"{name}, compiled"] = timed(_compiled(self, name))
        for isa in self.isas:
            calls[f"{self.designs[0]}, {isa}"] = _held_to(isa, calls[self.designs[0]])
        if "softmax" in self.baselines:
            calls["softmax"] = timed(functools.partial(F.scaled_dot_product_attention, is_causal=self.causal))
        if CEILING in self.baselines:
            side = self.ceiling_side
            a, b = (torch.randn(side, side).to(q.dtype) for _ in range(2))
            calls[CEILING] = lambda: F.linear(a, b)  # `a @ b` in bfloat16 is far slower without AVX-512
        return calls

    def mode(self) -> AbstractContextManager[object]:
        """What the calls run in. Entering it is not timed: a model does so once for all its layers."""
        return torch.inference_mode(not self.backward)

    def flops(self, contender: str) -> int:
        """Operations of one call. Attention has 2 products forward and, its scores computed again, 5 backward, each of
        2 D for every pair of a query and a key that it may see; SimA 2 and 4 of 2 D^2 for every token, whatever form
        computes it."""
        if contender == CEILING:
            return 2 * self.ceiling_side**3
        heads, n, d = self.batch * self.heads, self.tokens, self.head_size
        if contender != "softmax" and isinstance(mixer_of(contender.partition(", ")[0]), Sima):
            return heads * n * 2 * d * d * (6 if self.backward else 2)
        pairs = n * (n + 1) // 2 if self.causal else n * n
        return heads * pairs * 2 * d * (7 if self.backward else 2)

    @property
    def ceiling_side(self) -> int:
        """Side of square matrices whose product has the operations of the attention, but a large product at least."""
        flops = max((self.flops(name) for name in self.designs), default=0)
        return max(2048, round((flops / 2) ** (1 / 3) / 64) * 64)

    def _inputs(self) -> list[Tensor]:
        dtype = DTYPES[self.dtype]
        shape = (self.batch, self.tokens, self.heads, self.head_size)
        if self.layout == "packed":
            b, n, h, d = shape
            packed = torch.randn(b, n, 3, h, d).to(dtype)
            tensors = list(packed.permute(2, 0, 3, 1, 4).unbind(0))
        else:
            tensors = [torch.randn(shape).to(dtype).transpose(1, 2).contiguous() for _ in range(3)]
        return [t.detach().requires_grad_(self.backward) for t in tensors]


def mixer_of(name: str) -> Pointwise | Sima:
    """The mixer of a design that replaces softmax by another attention.

    Raises:
        ValueError: the design's mixer is softmax or mixes no tokens.
    """
    mixer: Mixer = design(name).layer(0, 1).mixer
    if not isinstance(mixer, Pointwise | Sima):
        raise ValueError(
            f"design {name!r} has no attention of formix's to time: choose pointwise designs or sima; softmax is "
            "always there as a baseline."
        )
    return mixer


def plain(mixer: Pointwise | Sima) -> Callable[..., Tensor]:
    """The operator as it is usually written in PyTorch, in the inputs' dtype; SimA as its official code has it
    (UCDvision/sima, class SimA)."""
    if isinstance(mixer, Sima):

        def sima(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
            q, k = F.normalize(q, p=1.0, dim=-2), F.normalize(k, p=1.0, dim=-2)
            return (q @ k.transpose(-2, -1)) @ v if q.shape[-2] < q.shape[-1] else q @ (k.transpose(-2, -1) @ v)

        return sima

    h = ACTIVATIONS[mixer.activation]

    def pointwise(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, N, N]
        n = scores.shape[-1]
        if mixer.activation == "sigmoid_bias":
            return h(scores - torch.tensor(n).log().to(q.dtype)) @ v
        weights = h(scores)
        if causal:
            length = torch.arange(1, n + 1, dtype=q.dtype)[:, None]
            return (weights.tril() @ v) / length**mixer.length_exponent
        return (weights @ v) * n**-mixer.length_exponent

    return pointwise


def fused_identity(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """SimA as Q diag(c) (K^T V), in the inputs' dtype: what a compiler can make of the identity."""
    c_q = q.abs().sum(-2, keepdim=True, dtype=torch.float32).clamp(min=1e-12)  # [B, H, 1, D]
    c_k = k.abs().sum(-2, keepdim=True, dtype=torch.float32).clamp(min=1e-12)
    k_v = (k.transpose(-2, -1) @ v) / (c_q * c_k).transpose(-2, -1)  # [B, H, D, D]
    return q @ k_v.to(q.dtype)


@functools.cache
def _compiled(case: AttentionCase, name: str) -> Operator:
    mixer = mixer_of(name)
    form = fused_identity if isinstance(mixer, Sima) else plain(mixer)
    torch._dynamo.config.recompile_limit = 256  # of all shapes that a run has, each compiled for itself
    return torch.compile(functools.partial(form, causal=case.causal), dynamic=False)


def _held_to(isa: str, call: Call) -> Call:
    def held() -> object:
        native.set_isa(isa)
        try:
            return call()
        finally:
            native.set_isa("auto")

    return held
