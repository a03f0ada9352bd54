"""Synthetic results with the shape of real ones. The numbers are invented and mean nothing."""

import math
import random

import pytest

from formix.comparison.results import CurvePoint, DesignRecord, Results, RunRecord, Task
from formix.environment import Environment

ENVIRONMENT = Environment(
    formix="0.0-synthetic",
    python="3.12.1",
    torch="2.9.0",
    timm="1.0.20",
    transformers="5.0.0",
    cpu="Imaginary CPU 9000 @ 3.00GHz",
    instruction_set="AVX512",
    threads=2,
    platform="Linux-x86_64",
    commit="0123456789ab",
)

# name: (description, final metric, relative cost, learning rate that wins)
IMAGE_DESIGNS = {
    "softmax": ("softmax(QKᵀ/√d) V, then an FFN", 0.962, 1.00, 1e-3),
    "relu": ("L⁻¹ relu(QKᵀ/√d) V, then an FFN", 0.957, 0.93, 1e-3),
    "sima": ("(Q/‖Q‖₁)(K/‖K‖₁)ᵀ V, then an FFN", 0.951, 0.88, 3e-3),
    "activator": ("a gated unit, no token mixing", 0.904, 0.71, 1e-3),
    "paf": ("attention and FFN side by side", 0.960, 0.84, 1e-3),
    "skip": ("some heads read an earlier layer's keys and values", 0.964, 0.97, 3e-4),
    "relu+paf+skip": ("ReLU attention, parallel, with skip wiring", 0.955, 0.79, 1e-3),
}


def synthetic_images(seeds: int = 3) -> Results:
    random.seed(0)
    runs = []
    for design, (_, metric, cost, best) in IMAGE_DESIGNS.items():
        for lr in (3e-4, 1e-3, 3e-3):
            for seed in range(seeds):
                end = metric - 0.02 * abs(math.log10(lr / best)) + random.gauss(0, 0.004)
                common = {"design": design, "seed": seed, "lr": lr, "config_hash": f"{design}-{lr}-{seed}"}
                if design == "relu+paf+skip" and lr == 3e-3 and seed == 1:
                    message = "the loss became NaN at step 118 with learning rate 0.003"
                    runs.append(RunRecord(**common, status="diverged", message=message))
                    continue
                runs.append(_run(common, end, 0.1, cost, selected=lr == best))
    return Results(
        command="formix compare --data digits --designs softmax,relu,sima,activator,paf,skip,relu+paf+skip --seeds 3",
        created="2025-01-02T03:04:05+00:00",
        environment=ENVIRONMENT,
        config={"data": "digits", "epochs": 30, "lrs": [3e-4, 1e-3, 3e-3], "model": {"depth": 6, "embed_dim": 96}},
        task=Task(
            data="digits",
            kind="image-classification",
            metric="accuracy",
            higher_is_better=True,
            chance=0.1,
            splits={"train": 1200, "validation": 237, "test": 360},
            model="vit, 6 layers of width 96",
            provenance="SYNTHETIC numbers; 1,797 images of 8x8 pixels from scikit-learn",
        ),
        designs=tuple(
            DesignRecord(design=name, description=values[0], definition={"mixer": name})
            for name, values in IMAGE_DESIGNS.items()
        ),
        runs=tuple(runs),
    )


def synthetic_text(seeds: int = 2) -> Results:
    random.seed(1)
    runs = []
    refused = "SimA normalises over all tokens, so a causal model would see the future."
    for design, metric, cost in (("softmax", 2.31, 1.0), ("relu", 2.36, 0.92), ("paf", 2.33, 0.85)):
        for lr in (1e-3, 3e-3):
            for seed in range(seeds):
                end = metric + 0.1 * (lr != 3e-3) + random.gauss(0, 0.012)
                common = {"design": design, "seed": seed, "lr": lr, "config_hash": f"{design}-{lr}-{seed}"}
                runs.append(_run(common, end, 8.0, 3 * cost, selected=lr == 3e-3))
    return Results(
        command="formix compare --data stdlib --designs softmax,relu,sima,paf --seeds 2",
        created="2025-01-02T03:14:05+00:00",
        environment=ENVIRONMENT,
        config={"data": "stdlib", "seconds": 20},
        task=Task(
            data="stdlib",
            kind="causal-lm",
            metric="bits_per_byte",
            higher_is_better=False,
            baselines={"byte bigram": 3.52},
            splits={"train": 30_000, "validation": 1_500, "test": 1_500},
            model="gpt2, 4 layers of width 128",
            provenance="SYNTHETIC numbers; the sources of Python's standard library",
        ),
        designs=(
            DesignRecord(design="softmax", description="softmax(QKᵀ/√d) V"),
            DesignRecord(design="relu", description="L⁻¹ relu(QKᵀ/√d) V"),
            DesignRecord(design="sima", description="(Q/‖Q‖₁)(K/‖K‖₁)ᵀ V", refused=refused),
            DesignRecord(design="paf", description="attention and FFN side by side"),
        ),
        runs=tuple(runs),
    )


def _run(common: dict, end: float, start: float, cost: float, selected: bool) -> RunRecord:
    curve = []
    for step in range(0, 1201, 100):
        left = math.exp(-step / 250)
        value = end + (start - end) * left + random.gauss(0, 0.006 * abs(start - end))
        curve.append(
            CurvePoint(
                step=step,
                epoch=step / 40,
                seconds=0.02 * cost * step,
                train_loss=2.3 * left + 0.05 * random.random() if step else None,
                validation=value,
            )
        )
    jitter = random.uniform(0.98, 1.02)
    return RunRecord(
        **common,
        status="ok",
        selected=selected,
        validation=curve[-1].validation,
        test=end + random.gauss(0, 0.002) if selected else None,
        curve=tuple(curve),
        parameters=int(667_000 * (0.6 + 0.4 * cost)),
        flops=int(22_400_000 * cost),
        train_items_per_second=2150 / cost * jitter,
        train_seconds=24 * cost * jitter,
        latency_ms={
            "float32": {"1": 2.9 * cost * jitter, "32": 21 * cost**1.5 * jitter},
            "bfloat16": {"1": 2.6 * cost * jitter, "32": 14 * cost**1.4 * jitter},
        },
        peak_memory_bytes=int(310e6 * (0.7 + 0.3 * cost)),
    )


@pytest.fixture
def images() -> Results:
    return synthetic_images()


@pytest.fixture
def text() -> Results:
    return synthetic_text()
