"""How many floating-point operations a forward pass takes, counted from the shapes and the design of every block.

PyTorch's own counter knows matrix products but reports none for its fused attention on the CPU, so attention is counted
here by formula. One multiplication and one addition are two operations; element-wise work, norms and softmax are not
counted; causal attention counts as full attention, as in PyTorch's counter.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from formix.design import Mixer, Sima


def mixer_flops(mixer: Mixer, heads: int, queries: int, keys: int, head_dim: int) -> int:
    """Operations of one sequence's mixer, without its projections.

    softmax, pointwise  2 H (Nq Nk D + Nq Nk D)
    SimA                the cheaper of that and 2 H (Nk D D + Nq D D): the order is chosen by the shapes
    """
    quadratic = 4 * heads * queries * keys * head_dim
    if isinstance(mixer, Sima):
        return min(quadratic, 2 * heads * (queries + keys) * head_dim**2)
    return quadratic


def count_flops(model: nn.Module, inputs: Mapping[str, Tensor] | Tensor) -> int:
    """Operations of one forward pass of `model` on `inputs`.

    Args:
        model: any model of formix's or made of its layers, timm's and transformers' linear and convolution layers.
        inputs: a batch: a tensor (images [B, C, H, W]) or keyword arguments; only the shapes matter.
    """
    return sum(flops_by_module(model, inputs).values())


def flops_by_module(model: nn.Module, inputs: Mapping[str, Tensor] | Tensor) -> dict[str, int]:
    """The same for every module that computes something, by its name in the model."""
    shadow = copy.deepcopy(model).to("meta").eval()
    counts: dict[str, int] = defaultdict(int)
    for name, module in shadow.named_modules():
        count = _counter(module)
        if count is not None:
            module.register_forward_hook(_hook(counts, name, count))
    with torch.no_grad():
        if isinstance(inputs, Tensor):
            shadow(inputs.to("meta"))
        else:
            shadow(**{k: v.to("meta") for k, v in inputs.items()})
    return dict(counts)


def _hook(counts: dict[str, int], name: str, count: Callable[[Tensor, Any], int]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        counts[name] += count(args[0], output[0] if isinstance(output, tuple) else output)

    return hook


def _counter(module: Any) -> Callable[[Tensor, Any], int] | None:
    """From a module's input and output to its operations; None for modules that cost nothing or whose parts count."""
    if isinstance(module, nn.Linear):
        return lambda x, y: 2 * y.numel() * module.in_features
    if isinstance(module, nn.modules.conv._ConvNd):
        per_output = module.in_channels // module.groups * module.weight[0, 0].numel()
        return lambda x, y: 2 * y.numel() * per_output
    if type(module).__name__ == "Conv1D":  # transformers' linear layer with a transposed weight
        return lambda x, y: 2 * y.numel() * module.nx
    if hasattr(module, "mixer_flops"):  # a mixer with another number of queries than of keys counts for itself
        return lambda x, y: module.mixer_flops(x)
    if hasattr(module, "mixer") and hasattr(module, "num_heads"):

        def attention(x: Tensor, y: Any) -> int:
            batch, tokens, channels = x.shape
            head_dim = getattr(module, "head_dim", None) or channels // module.num_heads
            return batch * mixer_flops(module.mixer, module.num_heads, tokens, tokens, head_dim)

        return attention
    return None
