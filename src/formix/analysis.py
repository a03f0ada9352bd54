"""What attention and FFN do to token embeddings, layer by layer: the two analyses of PAF's second version.

"Investigating the Role of Feed-Forward Networks in Transformers Using PAF Design" (arXiv 2305.13297v2) rests on two
assumptions: the FFN keeps token embeddings from becoming alike, and attention adds little to its input. For the
embeddings X [N, C] of one sequence, with mean m = mean_t(x_t) over its N tokens, this module measures

    spread   r1 = ||X - 1 m^T||_F / ||X||_F           1: unrelated embeddings, 0: all tokens the same
    cosine   c  = mean over pairs t != u of x_t . x_u / (|x_t| |x_u|)
    ratio    r2 = mean_t ||a_t|| / ||x_t||             a: the attention branch, x: the layer's input

The paper's own definitions of its curves are not public; these are formix's reading.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from formix.design import Layout
from formix.models.modes import evaluating
from formix.models.parts import Layer, layers
from formix.records import plain


@dataclass(frozen=True, kw_only=True)
class LayerAnalysis:
    """The figures of one layer, means over sequences (spread, cosine) and over tokens (ratio)."""

    layer: int
    name: str  # of the layer in the model
    spread_input: float  # r1 of the layer's input
    spread_after_attention: float  # r1 of LN(x + a) in post-norm series layers, of x + a in all others
    spread_after_ffn: float  # r1 of the layer's output
    cosine_after_attention: float
    cosine_after_ffn: float
    attention_ratio: float  # r2


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What `analyze` measured; `to_json` for files, `str` for people."""

    model: str
    design: dict[str, Any] | None  # None: not a model of formix's
    sequences: int
    tokens: int
    layers: list[LayerAnalysis]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(plain(self), indent=indent)

    def __str__(self) -> str:
        head = f"{'':>5}  {'spread r1':^29}  {'cosine':^19}  {'ratio r2':>9}\n"
        head += f"{'layer':>5}  {'input':>9} {'attention':>9} {'FFN':>9}  {'attention':>9} {'FFN':>9}  {'attention':>9}"
        rows = [
            f"{r.layer:>5}  {r.spread_input:>9.4f} {r.spread_after_attention:>9.4f} {r.spread_after_ffn:>9.4f}  "
            f"{r.cosine_after_attention:>9.4f} {r.cosine_after_ffn:>9.4f}  {r.attention_ratio:>9.4f}"
            for r in self.layers
        ]
        return "\n".join([f"{self.model}: {self.sequences} sequences, {self.tokens} tokens", head, *rows])


def analyze(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]], *, max_batches: int | None = None
) -> Analysis:
    """Spread of token embeddings after attention and after the FFN, and the size of the attention branch, per layer.

    Args:
        model: one whose layers `formix.models.parts` knows; of XCiT the patches' layers, where local patch
            interaction counts to the FFN. It runs in evaluation mode and is left as it was.
        batches: images [B, C, H, W], or a model's keyword arguments (`labels` are left out). Tokens that an
            `attention_mask` [B, N], or [B, choices, N], hides count nowhere; sequences of fewer than two tokens are
            left out.
        max_batches: stop after so many.

    Raises:
        ValueError: a model whose layers are not known here, or no sequence of two tokens.
    """
    model = getattr(model, "_orig_mod", model)  # hooks do not fire inside a compiled model
    found = layers(model)
    gathered = [_Sums() for _ in found]
    seen: dict[str, Tensor | None] = {"mask": None}
    handles = [
        handle
        for layer, sums in zip(found, gathered, strict=True)
        for handle in _watch(layer, lambda *states, sums=sums: sums.add(*states, mask=seen["mask"]))
    ]
    try:
        with evaluating(model), torch.no_grad():
            for batch in islice(batches, max_batches):
                images = batch if isinstance(batch, Tensor) else batch.get("pixel_values")
                if images is not None:
                    model(images.to(next(model.parameters()).dtype))
                    continue
                assert isinstance(batch, Mapping)
                mask = batch.get("attention_mask")
                seen["mask"] = None if mask is None else mask.bool().flatten(0, -2)  # choices are sequences as well
                model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    if not gathered[0].sequences:
        raise ValueError("There is no sequence of at least two tokens in these batches, so nothing to compare.")
    design = getattr(model, "design", None) or getattr(getattr(model, "config", None), "design", None)
    return Analysis(
        model=type(model).__name__,
        design=design if design is None or isinstance(design, dict) else design.to_dict(),
        sequences=gathered[0].sequences,
        tokens=gathered[0].tokens,
        layers=[s.result(i, layer.name) for i, (s, layer) in enumerate(zip(gathered, found, strict=True))],
    )


def spread(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """r1 = ||X - 1 m^T||_F / ||X||_F of every sequence: [B, N, C] and optionally [B, N], True = token -> [B]."""
    x, weight = _counted(x, mask)
    mean = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)  # [B, 1, C]
    around = ((x - mean) * weight).square().sum((1, 2)).sqrt()
    return around / (x * weight).square().sum((1, 2)).sqrt().clamp(min=torch.finfo(x.dtype).tiny)


def mean_cosine(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cosine of all pairs of different tokens of every sequence: [B, N, C], [B, N] -> [B].

    The sum over pairs is ||sum_t u_t||^2 - N for unit vectors u, so no N x N matrix is formed.
    """
    x, weight = _counted(x, mask)
    units = x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) * weight
    number = weight.sum((1, 2))
    pairs = units.sum(1).square().sum(-1) - units.square().sum((1, 2))
    return pairs / (number * (number - 1)).clamp(min=1)


def _counted(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    weight = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
    return x, weight[..., None]  # [B, N, 1]


class _Sums:
    """Sums over the batches of one layer's figures."""

    def __init__(self) -> None:
        self.sequences = self.tokens = 0
        self.of_sequences = torch.zeros(5, dtype=torch.float64)
        self.of_tokens = 0.0

    def add(self, x: Tensor, branch: Tensor, after: Tensor, out: Tensor, *, mask: Tensor | None) -> None:
        mask = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        kept = mask.sum(1) >= 2
        x, branch, after, out, mask = (t[kept] for t in (x, branch, after, out, mask))
        figures = (
            spread(x, mask),
            spread(after, mask),
            spread(out, mask),
            mean_cosine(after, mask),
            mean_cosine(out, mask),
        )
        self.sequences, self.tokens = self.sequences + int(kept.sum()), self.tokens + int(mask.sum())
        self.of_sequences += torch.stack([f.sum() for f in figures]).double().cpu()
        size = x.double().norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
        self.of_tokens += float((branch.double().norm(dim=-1) / size)[mask].sum())

    def result(self, layer: int, name: str) -> LayerAnalysis:
        before, attention, ffn, cosine_attention, cosine_ffn = (self.of_sequences / self.sequences).tolist()
        return LayerAnalysis(
            layer=layer,
            name=name,
            spread_input=before,
            spread_after_attention=attention,
            spread_after_ffn=ffn,
            cosine_after_attention=cosine_attention,
            cosine_after_ffn=cosine_ffn,
            attention_ratio=self.of_tokens / self.tokens,
        )


def _watch(layer: Layer, report: Callable[..., None]) -> list[Any]:
    """Hooks that report a layer's input, attention branch, state after attention and output at every forward pass."""
    block = layer.block
    layout: Layout = getattr(block, "layout", None) or Layout()
    normed = getattr(block, "norm_position", "post" if layer.post else "pre") == "post" and not layout.parallel
    states: dict[str, Tensor] = {}

    def start(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.clear()
        states["x"] = args[0] if args else next(kwargs[k] for k in ("hidden_states", "hidden_state") if k in kwargs)

    def keep(name: str) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            states.setdefault(name, _tensor(output))  # the first: a norm may be used again after the FFN

        return hook

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        x, branch = states["x"], states["branch"]
        report(x, branch, states["normed"] if normed else x + branch, _tensor(output))

    return [
        block.register_forward_pre_hook(start, with_kwargs=True),
        layer.scaled.register_forward_hook(keep("branch")),
        layer.norms[0].register_forward_hook(keep("normed")),
        block.register_forward_hook(end),
    ]


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
