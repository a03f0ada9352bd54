"""`formix convert`: a pretrained model, in another design."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import field
from pathlib import Path
from typing import Any

from formix.commands.arguments import parse

# what a transformers directory keeps beside the weights: how its inputs are made
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "generation_config.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """A pretrained model with its blocks in another design."""

    source: str  # a directory (timm, transformers, formix), a timm name or a transformers id
    design: str  # a design's name or combination
    out: str | None = None  # the directory of the result
    dry_run: bool = False  # print the plan and write nothing
    layers: str | None = None  # layers to convert, as 0,2,4-7; None: all
    keep: str | None = None  # layers that stay as they are, as softmax:0,1
    checkpoint: str | None = None  # a file of weights for a timm name, in place of the published ones
    task: str | None = None  # transformers' class, such as BertForMaskedLM; None: the one that the config names
    model_args: dict[str, Any] = field(default_factory=dict)  # arguments for a timm name: {num_classes: 0}


def convert(arguments: list[str]) -> int:
    """Convert a pretrained model to another design."""
    from formix import save
    from formix.conversion.carry import convert_model, plan_conversion
    from formix.conversion.load import load_source

    given = [f"--source={arguments[0]}", *arguments[1:]] if arguments and arguments[0][:1] != "-" else arguments
    given = ["--dry_run=true" if flag in ("--dry-run", "--dry_run") else flag for flag in given]
    config = parse(ConvertConfig, "convert", given)
    if config.out is None and not config.dry_run:
        raise ValueError("out is missing; give --out=DIR, or --dry-run to see the plan.")
    source = load_source(config.source, checkpoint=config.checkpoint, task=config.task, **config.model_args)
    options = {"layers": config.layers, "keep": config.keep}
    if config.dry_run:
        print(plan_conversion(source, config.design, **options))
        return 0
    model = convert_model(source, config.design, **options)
    save(model, str(config.out))
    copy_companions(Path(config.source), Path(str(config.out)))
    print(f"{config.out}: {model.conversion.plan['formula']}")
    return 0


def copy_companions(source: Path, out: Path) -> None:
    """Take the tokenizer or the image processor along."""
    for name in COMPANIONS:
        if (source / name).is_file() and not (out / name).exists():
            shutil.copyfile(source / name, out / name)
