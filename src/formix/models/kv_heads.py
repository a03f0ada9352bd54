"""Key/value heads under skip wiring: which ones a layer projects, and where each one it reads comes from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from formix.design import LayerDesign
from formix.layers.attention import KeyValue


@dataclass(frozen=True)
class KeyValueHeads:
    """The key/value heads of one layer.

    Attention runs over heads 0 to H - 1: head i is the source layer's if i is in S_l and the layer's own otherwise
    (arXiv 2406.11274). A layer's own head that is overridden and that no later layer reads is dead: it is left out
    of the projections of a pruned model.
    """

    total: int  # H, heads that attention runs over
    own: tuple[int, ...]  # heads that the layer projects, in order; all unless pruned
    runs: tuple[tuple[bool, int, int], ...]  # (of the source?, first, last + 1) places whose union is heads 0 to H - 1

    @classmethod
    def of(cls, layer: LayerDesign, total: int, *, pruned: bool) -> KeyValueHeads:
        """The heads of `layer` in a model with `total` key/value heads."""
        skip = set(layer.skip_heads(total))
        own = live_heads(layer, layer.index, total) if pruned else tuple(range(total))
        theirs = own
        if layer.source is not None:
            theirs = live_heads(layer, layer.source, total) if pruned else tuple(range(total))
        runs: list[tuple[bool, int, int]] = []
        for head in range(total):
            of_source = head in skip
            place = (theirs if of_source else own).index(head)
            if runs and runs[-1][0] == of_source and runs[-1][2] == place:
                runs[-1] = (of_source, runs[-1][1], place + 1)
            else:
                runs.append((of_source, place, place + 1))
        return cls(total=total, own=own, runs=tuple(runs))

    def gather(self, own: KeyValue, source: KeyValue | None) -> KeyValue:
        """Keys and values [B, H, N, D] that attention reads, out of the layer's own and the source layer's."""
        if self.runs == ((False, 0, self.total),) and len(self.own) == self.total:
            return own
        assert source is not None, "the layer reads another layer's heads"

        def pick(mine: Tensor, theirs: Tensor) -> Tensor:
            parts = [(theirs if of_source else mine)[:, first:last] for of_source, first, last in self.runs]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

        return pick(own[0], source[0]), pick(own[1], source[1])


def live_heads(layer: LayerDesign, index: int, total: int) -> tuple[int, ...]:
    """The own heads of layer `index` that it or a later layer reads; `layer` is any layer of the same model."""
    if layer.wiring is None:
        return tuple(range(total))
    sources = layer.wiring.resolve(layer.depth)
    live = set(range(total))
    if sources[index] is not None:
        live -= set(layer.wiring.skip_heads(index, total, layer.depth))
    for reader, source in enumerate(sources):
        if source == index:
            live |= set(layer.wiring.skip_heads(reader, total, layer.depth))
    return tuple(sorted(live))


def prune_kv_heads(model: nn.Module) -> int:
    """Remove, in place, the key and value projections of heads that no layer reads, and say so in the config.

    Logits stay equal, generation caches less, and so does what `formix.save` writes; `formix.load` gives the pruned
    model back. The wiring fixes which heads these are, so the design stays the same.

    Args:
        model: a text model of formix's with skip wiring.

    Returns:
        The number of parameters removed; 0 if every head is read by some layer.

    Raises:
        ValueError: not such a model, or one whose projections are not plain ones (adapters, quantisation).
    """
    from formix.models.hf import DesignedAttention

    layers = [module for module in model.modules() if isinstance(module, DesignedAttention)]
    config = getattr(model, "config", None)
    if not layers or config is None:
        raise ValueError(f"A {type(model).__name__} has no key/value heads to prune; make a text model with 'skip'.")
    before = sum(p.numel() for p in model.parameters())
    for attention in layers:
        attention.prune_kv()
    removed = before - sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "pruned_kv"):
            module.config.pruned_kv = removed > 0 or module.config.pruned_kv  # heads and trunk may have copies
    return removed
