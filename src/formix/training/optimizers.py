"""Optimisers by name, from timm and torch, with groups for weight decay and layer-wise rates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from formix.training.config import TrainConfig

# transformers' names: where the embeddings end and the layers are; whatever matches neither is the head
_TRANSFORMERS_LAYERS = {
    "stem": r"(?:.*\.)?(?:embeddings|wte|wpe|embed_tokens)\.",
    "blocks": [
        (r"(?:.*\.)?stages\.(\d+)\.layers\.(\d+)\.", None),
        (r"(?:.*\.)?stages\.(\d+)\.", (-1,)),  # CvT's: a stage's embedding is below its layers
        (r"(?:.*\.)?(?:layer|layers|h)\.(\d+)\.", None),
    ],
}


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimiser that the config names, in torch's fused implementation where it has one.

    Biases, norms and what the model's `no_weight_decay()` names are not decayed. With `layer_decay` r, the learning
    rate of layer i of L is multiplied by r^(L - i) (`lr_scale` of its group), as in BEiT's fine-tuning. With
    `independent_decay`, the weights shrink by weight_decay x schedule per step, without the factor lr: big_vision's
    rule, which in torch's AdamW is the decay weight_decay / lr.

    Raises:
        ValueError: `layer_decay` and a model whose layers are not known.
    """
    decay = config.weight_decay / config.lr if config.independent_decay else config.weight_decay
    settings: dict[str, Any] = {"opt": config.optimizer, "lr": config.lr, "weight_decay": decay, "fused": True}
    if config.optimizer == "sgd":  # timm's has Nesterov's momentum
        settings["momentum"] = config.beta1
        settings["fused"] = not any(isinstance(p, DTensor) for p in model.parameters())  # PyTorch's has no shards
    else:
        settings |= {"betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.layer_decay == 1:
        return create_optimizer_v2(model, **settings)
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_layer_decay(_layered(model), decay, exempt, layer_decay=config.layer_decay)
    return create_optimizer_v2(groups, **settings)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every group `lr`, times the scale that layer-wise decay gave it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _layered(model: nn.Module) -> Any:
    """What timm asks for the layers of its own models; transformers' models are described in the same words."""
    if hasattr(model, "group_matcher"):
        return model
    if not hasattr(model, "config"):
        raise ValueError(
            f"layer_decay needs a model with numbered layers, and a {type(model).__name__} does not say which it has; "
            "leave layer_decay at 1."
        )
    return SimpleNamespace(named_parameters=model.named_parameters, group_matcher=lambda coarse: _TRANSFORMERS_LAYERS)
