"""How fast formix's training loop is beside a bare PyTorch loop, timm's and transformers' Trainer.

    python scripts/train_overhead.py images          # formix, bare, timm: images/s
    python scripts/train_overhead.py text            # formix, bare, Trainer: tokens/s

All train the same model, from the same weights, on the same samples with the same fused AdamW, clipping and precision,
in turn in one process, `--rounds` times. A round's speed is that of its steps after the first `--warmup`; printed are
the medians over the rounds, and the medians of the ratios to the bare loop of the same round.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

import formix
from formix.data import Batch, Data, collate, load_data
from formix.training import TrainConfig, train

WEIGHT_DECAY, CLIP, LR = 0.05, 1.0, 1e-3
Contestant = Callable[[nn.Module, Data, int, int], list[float]]  # model, data, batch size, steps -> when steps ended


class Samples(Dataset):
    """The training split sample by sample, as libraries expect it; made tensors in advance, so that none decodes."""

    def __init__(self, data: Data, form: Callable[[Batch], Any]) -> None:
        self.samples = [form(data.train[i]) for i in range(len(data.train))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    if "pixel_values" in batch:
        logits = model(batch["pixel_values"])
    else:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits  # as Trainer asks for
    return nn.functional.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())


def bare(model: nn.Module, data: Data, size: int, steps: int) -> list[float]:
    """The loop that one would write first."""
    loader = DataLoader(data.train, batch_size=size, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    ends = []
    model.train()
    for batch in forever(loader):
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
        if len(ends) == steps:
            return ends
    raise AssertionError


def with_formix(model: nn.Module, data: Data, size: int, steps: int) -> list[float]:
    """`formix.training.train`."""
    ends: list[float] = []
    per_epoch = -(-len(data.train) // size)
    config = TrainConfig(
        epochs=steps / per_epoch,
        batch_size=size,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        clip=CLIP,
        precision="float32",
        evaluations=1,
    )
    train(model, data, config, on_step=lambda step: ends.append(time.perf_counter()))
    return ends[:-1]  # the last one has the evaluation in it


def with_timm(model: nn.Module, data: Data, size: int, steps: int) -> list[float]:
    """The loop of timm's train.py with its parts: loader, optimiser, schedule, clipping, meters."""
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter, dispatch_clip_grad

    samples = Samples(data, lambda sample: (sample["pixel_values"], int(sample["labels"])))
    loader = DataLoader(samples, batch_size=size, shuffle=True, drop_last=True, collate_fn=default_collate)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=10, updates_per_epoch=len(loader), step_on_epochs=False)
    criterion = LabelSmoothingCrossEntropy(0.0)
    losses, updates = AverageMeter(), AverageMeter()
    ends: list[float] = []
    model.train()
    begin = time.time()
    for inputs, target in forever(loader):
        output = model(inputs)
        loss = criterion(output, target)
        loss.backward()
        dispatch_clip_grad(model.parameters(), value=CLIP, mode="norm")
        optimizer.step()
        optimizer.zero_grad()
        losses.update(loss.item(), inputs.size(0))
        updates.update(time.time() - begin)
        begin = time.time()
        scheduler.step_update(num_updates=len(ends), metric=losses.avg)
        ends.append(time.perf_counter())
        if len(ends) == steps:
            return ends
    raise AssertionError


def with_trainer(model: nn.Module, data: Data, size: int, steps: int) -> list[float]:
    """transformers' Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=size,
            max_steps=steps,
            learning_rate=LR,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP,
            optim="adamw_torch_fused",
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            logging_strategy="no",
        )
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=Samples(data, dict),
            callbacks=[Clock()],
            compute_loss_func=lambda outputs, labels, **more: nn.functional.cross_entropy(
                outputs.logits.flatten(0, -2), labels.flatten()
            ),
        )
        trainer.train()
    return ends


def image_task(small: bool) -> tuple[nn.Module, Data, int]:
    """A ViT of width 192, 6 layers, 64 tokens; pictures of digits scaled to 64 x 64."""
    data = load_data("digits", img_size=32 if small else 64)
    sizes = {"embed_dim": 16, "num_heads": 2, "depth": 1} if small else {"depth": 6}
    model = formix.create_model(
        "vit_tiny_patch16_224", "softmax", img_size=data.img_size, patch_size=8, in_chans=1, num_classes=10, **sizes
    )
    return model, data, 32


def text_task(small: bool) -> tuple[nn.Module, Data, int]:
    """GPT-2 of width 128, 4 layers on the bytes of Python's standard library, windows of 128."""
    length = 32 if small else 128
    data = load_data("stdlib", sequence_length=length, limit=100_000, validation_fraction=0.003, test_fraction=0.01)
    layers = {"n_layer": 1} if small else {}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = formix.create_model("gpt2-nano", "softmax", vocab_size=256, n_positions=length, **layers, **dropout)
    return model, data, 16


TASKS: dict[str, tuple[Callable[[bool], tuple[nn.Module, Data, int]], str, dict[str, Contestant]]] = {
    "images": (image_task, "images/s", {"bare": bare, "formix": with_formix, "timm": with_timm}),
    "text": (text_task, "tokens/s", {"bare": bare, "formix": with_formix, "Trainer": with_trainer}),
}


def measure(task: str, *, rounds: int, steps: int, warmup: int, small: bool = False) -> dict[str, Any]:
    """Speeds by contestant, and ratios to the bare loop, each a median over rounds."""
    make, unit, contestants = TASKS[task]
    torch.manual_seed(0)
    model, data, size = make(small)
    items = size * (data.sequence_length or 1)
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        names = list(contestants)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody is always the first
            ends = contestants[name](copy.deepcopy(model), data, size, steps)
            speeds[name].append(items * (len(ends) - warmup) / (ends[-1] - ends[warmup - 1]))
    ratios = {name: [a / b for a, b in zip(speeds[name], speeds["bare"], strict=True)] for name in contestants}
    return {
        "task": task,
        "unit": unit,
        "batch_size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rounds": rounds,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "speed": {name: statistics.median(values) for name, values in speeds.items()},
        "to bare": {name: statistics.median(values) for name, values in ratios.items()},
        "all speeds": speeds,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25, help="of the optimiser in a round")
    parser.add_argument("--warmup", type=int, default=5, help="steps of a round that are not timed")
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice if left out")
    parser.add_argument("--small", action="store_true", help="a model too small to say anything, to try the script")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args(arguments)
    if not 1 <= given.warmup < given.steps - 1:
        parser.error(f"warmup is {given.warmup} and steps {given.steps}; at least two steps must be left to time")
    if given.threads:
        torch.set_num_threads(given.threads)
    result = measure(given.task, rounds=given.rounds, steps=given.steps, warmup=given.warmup, small=given.small)
    for name, speed in result["speed"].items():
        print(f"{name:8} {speed:12,.1f} {result['unit']}   {result['to bare'][name]:.3f} of bare")
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
