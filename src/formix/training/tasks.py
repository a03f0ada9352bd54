"""What a task asks of a model: the loss of a batch and the metric of a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional import spearman_corrcoef

from formix.data import Batch, BatchDataset, Data, collate
from formix.models.modes import evaluating
from formix.training.config import Loss
from formix.training.parallel import gathered, process_count, whole

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Logits: [B, classes], [B, 1] (regression) or [B, T, vocabulary]."""
    if "pixel_values" in batch:
        output: Any = model(batch["pixel_values"])
        return output if isinstance(output, Tensor) else output.logits  # CvT is transformers'
    inputs: dict[str, Any] = {k: batch[k] for k in MODEL_INPUTS if k in batch}
    if hasattr(whole(model), "config"):
        inputs["use_cache"] = False  # transformers' decoders keep all keys and values otherwise
    output = model(**inputs)
    return output.logits


def loss_of(logits: Tensor, labels: Tensor, data: Data, label_smoothing: float = 0.0, loss: Loss = "softmax") -> Tensor:
    """Mean cross-entropy in nats, or the mean squared error of a regression; in float32.

    Labels are class indices, of which -100 does not count, or after mixup distributions [B, classes]. With "sigmoid",
    every class is a binary question of its own and their cross-entropies are summed (big_vision's sigmoid_xent).
    """
    logits = logits.float()
    if data.task == "sequence-regression":
        return F.mse_loss(logits[:, 0], labels)
    logits = logits.flatten(0, -2)  # [B, classes]
    labels = labels if labels.is_floating_point() else labels.flatten()
    if loss == "sigmoid":
        classes = logits.shape[-1]
        targets = labels if labels.is_floating_point() else F.one_hot(labels, classes).float()
        targets = targets * (1 - label_smoothing) + label_smoothing / classes
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1).mean()
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run minimises, and what its model is judged by."""

    loss: Callable[[nn.Module, Batch], Tensor]  # mean over the batch's samples; called under the run's autocast
    metric: Callable[[nn.Module], float]  # on held-out data, in evaluation mode; it restores the mode
    higher_is_better: bool  # of the metric


def task_objective(data: Data, label_smoothing: float = 0.0, loss: Loss = "softmax") -> Objective:
    """The data's own: cross-entropy or squared error, and the data's metric on the validation split.

    Raises:
        ValueError: a loss that the task has not, or smoothed labels where they are scores.
    """
    if loss == "sigmoid" and data.task not in ("image-classification", "sequence-classification"):
        raise ValueError(f"loss is 'sigmoid', which is for classes, and {data.name!r} is {data.task}; use 'softmax'.")
    if label_smoothing and data.task == "sequence-regression":
        raise ValueError(
            f"label_smoothing is {label_smoothing}, and the labels of {data.name!r} are scores, which have no classes "
            "to smooth over; leave it at 0."
        )
    return Objective(
        loss=lambda model, batch: loss_of(forward(model, batch), batch["labels"], data, label_smoothing, loss),
        metric=lambda model: evaluate(model, data, "validation"),
        higher_is_better=data.higher_is_better,
    )


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, split: str, *, batch_size: int = 256) -> float:
    """The data's metric on a split, in evaluation mode and the weights' own precision; every sample counts once.

    accuracy in [0, 1]; bits_per_byte = nats per target / ln 2 / bytes per target; perplexity = exp(nats per target) of
    masked tokens; Matthews and Spearman correlations; of a model with outputs that are no numbers none of these is one
    (NaN). Several processes share the work and all have the result.
    """
    own = next(model.parameters())
    outputs: list[Tensor] = []
    labels: list[Tensor] = []
    nats, targets, broken = 0.0, 0, False
    with evaluating(model):
        for batch, counts in _shared_batches(getattr(data, split), batch_size):
            batch = {k: v.to(own.device) for k, v in batch.items()}
            if "pixel_values" in batch:
                batch["pixel_values"] = batch["pixel_values"].to(own.dtype)
            logits, expected = forward(model, batch).float(), batch["labels"]
            if not counts:
                continue
            if data.metric in ("bits_per_byte", "perplexity"):
                nats += F.cross_entropy(logits.flatten(0, -2), expected.flatten(), reduction="sum").double().item()
                targets += int((expected >= 0).sum())
            else:
                broken |= bool(logits.isnan().any())  # which argmax and ranks would not show
                outputs.append(logits[:, 0] if data.task == "sequence-regression" else logits.argmax(-1))
                labels.append(expected)
    if data.metric in ("bits_per_byte", "perplexity"):
        shares = gathered((nats, targets))
        mean = sum(nats for nats, _ in shares) / sum(targets for _, targets in shares)
        if data.metric == "perplexity":
            return math.exp(min(mean, 700.0))  # a double ends at exp(709)
        assert data.bytes_per_target is not None
        return mean / math.log(2) / data.bytes_per_target[split]
    shared = gathered(([t.cpu() for t in outputs], [t.cpu() for t in labels], broken))
    if any(share[2] for share in shared):
        return math.nan
    predicted, expected = (torch.cat([t for share in shared for t in share[i]]) for i in (0, 1))
    if data.metric == "accuracy":
        return (predicted == expected).double().mean().item()
    if data.metric == "matthews_corrcoef":
        from sklearn.metrics import matthews_corrcoef  # GLUE's; torchmetrics' is not 0 for one and the same answer

        return float(matthews_corrcoef(expected.numpy(), predicted.numpy()))
    return spearman_corrcoef(predicted, expected).item()


def _shared_batches(dataset: BatchDataset, batch_size: int) -> Iterator[tuple[Batch, bool]]:
    """This process's part, every P-th sample, in as many batches as the others have; one with False only keeps pace."""
    process, processes = process_count()
    mine, most = range(len(dataset))[process::processes], math.ceil(len(dataset) / processes)
    batches = [list(mine[start : start + batch_size]) for start in range(0, most, batch_size)]
    loader = DataLoader(dataset, batch_sampler=[b or [0] for b in batches], collate_fn=collate)
    return zip(loader, map(bool, batches), strict=True)
