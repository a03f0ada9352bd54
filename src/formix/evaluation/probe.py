"""Linear probe: logistic regression on the frozen features of an image model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from formix.data import Data, collate
from formix.data.base import SPLITS
from formix.data.images import ImageDataset
from formix.evaluation.suitable import check_data, normalised_for
from formix.models.modes import evaluating
from formix.training.acceleration import autocast_dtype

PENALTIES = (0.01, 0.1, 1.0)  # scikit-learn's C, tried on the validation split


def linear_probe(
    model: Any, data: Data, *, limit: int = 10_000, batch_size: int = 64, precision: str = "auto"
) -> float:
    """Accuracy on test of multinomial logistic regression on a model's frozen features.

    The features are standardised; the regression is fitted on train with each C of `PENALTIES`, and the C that is best
    on validation is reported, of equals the smallest. Images are normalised by the model's own statistics where it has
    some.

    Args:
        model: a timm model, formix's or a stock one, that takes images of the data's size.
        data: image classification, from `load_data`.
        limit: training samples that the regression is fitted on, drawn with seed 0; all if there are fewer.
        precision: of the features, as in training: "auto", "float32" or "bfloat16".

    Raises:
        ValueError: data of another task, or images of another size or other channels than the model's.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    if data.task != "image-classification":
        raise ValueError(f"A linear probe needs labelled images; {data.name!r} is data for {data.task}.")
    data = normalised_for(model, data)
    check_data(model, data, "The model")
    features: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for split in SPLITS:
        dataset: ImageDataset = getattr(data, split)
        rows = np.arange(len(dataset))
        if split == "train":
            rows = np.random.default_rng(0).permutation(len(dataset))[:limit]
        part = Subset(dataset, rows.tolist())
        features[split] = image_features(model, part, batch_size=batch_size, precision=precision).cpu().numpy()
        labels[split] = dataset.labels.numpy()[rows]
    scaler = StandardScaler().fit(features["train"])
    features = {split: scaler.transform(x) for split, x in features.items()}
    probe = LogisticRegression(max_iter=1000, tol=1e-3, warm_start=True)  # each fit goes on from the last
    scores = []
    for c in PENALTIES:
        probe.set_params(C=c).fit(features["train"], labels["train"])
        scores.append([probe.score(features[split], labels[split]) for split in ("validation", "test")])
    return float(max(scores, key=lambda score: score[0])[1])  # which looks at validation alone


@torch.no_grad()
def image_features(model: Any, dataset: Dataset, *, batch_size: int = 64, precision: str = "auto") -> Tensor:
    """What a model's classifier reads, [N, C] in float32: its pooled features, in evaluation mode.

    The data set is an `ImageDataset` or a torch `Subset` of one.
    """
    own, dtype = next(model.parameters()), autocast_dtype(precision)
    parts = []
    with evaluating(model), torch.autocast(own.device.type, dtype, enabled=dtype is not None):
        for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collate):
            tokens = model.forward_features(batch["pixel_values"].to(own))
            parts.append(model.forward_head(tokens, pre_logits=True).float())  # [B, C]
    return torch.cat(parts)
