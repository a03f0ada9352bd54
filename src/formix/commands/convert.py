"""`formix convert`: a pretrained model, in another design."""

from __future__ import annotations

import dataclasses
import re
import shutil
from dataclasses import field
from pathlib import Path
from typing import Any

from formix.commands.arguments import parse

# what a transformers directory keeps beside the weights: how its inputs are made
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """A pretrained model with its blocks in another design."""

    source: str  # a directory (timm, transformers, formix), a timm name or a transformers id
    design: str  # a design's name or combination; several with commas, each to a directory of its own in out
    out: str | None = None  # the directory of the result
    dry_run: bool = False  # print the plan and write nothing
    layers: str | None = None  # layers to convert, as 0,2,4-7; None: all
    keep: str | None = None  # layers that stay as they are, as softmax:0,1
    checkpoint: str | None = None  # a file of weights for a timm name, in place of the published ones
    task: str | None = None  # transformers' class, such as BertForMaskedLM; None: the one that the config names
    model_args: dict[str, Any] = field(default_factory=dict)  # arguments for a timm name: {num_classes: 0}
    recover: str | None = None  # data for recovery by distillation, as glue:DIR/TASK+text:PATH or folder:PATH
    recovery: dict[str, Any] = field(default_factory=dict)  # its settings: {stages: "match:240s,align:900s", ...}
    sts: str | None = None  # an STS-B file: Spearman correlation of mean-pooled sentence embeddings, at every step
    probe: str | None = None  # labelled images: accuracy of a linear probe on the features, at every step
    perplexity: str | None = None  # text:PATH for a decoder's perplexity, at every step
    threads: int | None = None  # CPU threads; None: PyTorch's choice
    search: int | None = None  # convert up to so many layers, those that hurt least first (needs --recover's data)
    max_loss: float | None = None  # of the search: the largest loss to the source, end to end
    max_milliseconds: float | None = None  # of the search: how long a forward pass on a batch may take
    record: str | None = None  # a directory for the records of studies and the table over them


def convert(arguments: list[str]) -> int:
    """Convert a pretrained model to another design."""
    import torch

    from formix.conversion.carry import plan_conversion
    from formix.conversion.load import load_source

    study, config = _config(arguments)
    if config.out is None and not config.dry_run:
        raise ValueError("out is missing; give --out=DIR, or --dry-run to see the plan.")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    designs = [name.strip() for name in re.split(r",(?![^(]*\))", config.design) if name.strip()]
    source = load_source(config.source, checkpoint=config.checkpoint, task=config.task, **config.model_args)
    for design in designs:
        if config.dry_run:
            print(plan_conversion(source, design, layers=config.layers, keep=config.keep))
            continue
        place = Path(str(config.out)) / design if len(designs) > 1 else Path(str(config.out))
        _convert(source, dataclasses.replace(config, design=design, out=str(place)), study)
    return 0


def _config(arguments: list[str]) -> tuple[str, ConvertConfig]:
    """The name of the study and what it asks for; the first argument may be a source or a study's YAML."""
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    flags = arguments if first is None else arguments[1:]
    if first is not None and first.endswith((".yaml", ".yml")):
        if not Path(first).is_file():
            raise ValueError(f"{first} is no file; give a study's YAML.")
        return Path(first).stem, parse(ConvertConfig, "convert", ["--config", first, *flags])
    config = parse(ConvertConfig, "convert", flags if first is None else [f"--source={first}", *flags])
    return Path(config.source).name, config


def _convert(source: Any, config: ConvertConfig, study: str) -> None:
    from formix import save
    from formix.conversion.carry import convert_model
    from formix.conversion.report import measure_speed, write_report
    from formix.conversion.summary import write_record

    options = {"layers": config.layers, "keep": config.keep}
    if config.search is not None:
        config = dataclasses.replace(config, layers=_searched(source, config))
        options["layers"] = config.layers
    if config.recover is None:
        model = convert_model(source, config.design, **options)
    else:
        model = _recovered(source, config, options)
        model.conversion.speed = measure_speed(source, model)
    save(model, str(config.out))
    copy_companions(Path(config.source), Path(str(config.out)))
    if config.recover is not None:
        write_report(model.conversion.to_dict(), Path(str(config.out)) / "report.html")
    if config.record is not None:
        write_record(model.conversion, Path(config.record), study, config.design)
    print(f"{config.out}: {model.conversion.plan['formula']}")
    for step, values in model.conversion.metrics.items():
        print(f"  {step:12}" + "".join(f"  {name} {value:.4f}" for name, value in values.items()))


def _searched(source: Any, config: ConvertConfig) -> str:
    """The layers that a search chose; its curve is printed and kept beside the model."""
    import itertools
    import json

    from torch.utils.data import DataLoader

    from formix.conversion.carry import as_teacher
    from formix.conversion.pipeline import load_recovery_data
    from formix.conversion.search import search
    from formix.data import collate

    if config.recover is None or config.layers is not None or config.keep is not None:
        raise ValueError("--search needs --recover=DATA, and chooses the layers itself: leave out --layers and --keep.")
    recovery, place = _recovery(config)
    data, batch_size = load_recovery_data(as_teacher(source), recovery, place)
    loader = DataLoader(data.train, batch_size=batch_size, collate_fn=collate, shuffle=True)
    found = search(
        source,
        config.design,
        list(itertools.islice(loader, max(2, 2 * recovery.calibration))),
        most=int(config.search or 0),
        max_loss=config.max_loss,
        max_milliseconds=config.max_milliseconds,
        metrics=_metrics(config),
    )
    print(found)
    if not found.chosen:
        raise ValueError(f"No layer can be converted within max_loss={config.max_loss:g}; allow more or recover first.")
    out = Path(str(config.out))
    out.mkdir(parents=True, exist_ok=True)
    (out / "search.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    return ",".join(map(str, found.chosen))


def _recovery(config: ConvertConfig) -> tuple[Any, str | None]:
    """The settings of recovery, and the directory that the source is."""
    from formix.conversion.pipeline import Recovery

    known = {f.name for f in dataclasses.fields(Recovery)} - {"data"}
    if unknown := sorted(set(config.recovery) - known):
        raise ValueError(f"recovery has {', '.join(map(repr, unknown))}; it takes {', '.join(sorted(known))}.")
    place = config.source if Path(config.source).is_dir() else None
    return Recovery(data=str(config.recover), **config.recovery), place


def _metrics(config: ConvertConfig) -> dict[str, Any]:
    from formix.conversion.metrics import metrics_for

    recovery, place = _recovery(config)
    return metrics_for(
        tokenizer=recovery.tokenizer or place,
        sts=config.sts,
        probe=config.probe,
        perplexity=config.perplexity,
        sequence_length=recovery.sequence_length,
        img_size=recovery.img_size,
        on_bad_sample=recovery.on_bad_sample,
    )


def _recovered(source: Any, config: ConvertConfig, options: dict[str, Any]) -> Any:
    from formix.commands.progress import stage_progress
    from formix.conversion.pipeline import run

    recovery, place = _recovery(config)
    metrics = _metrics(config)
    state = Path(str(config.out)) / "recovery"
    with stage_progress() as show:
        model = run(
            source, config.design, recovery, **options, place=place, state=state, metrics=metrics, on_progress=show
        )
    shutil.rmtree(state, ignore_errors=True)
    return model


def copy_companions(source: Path, out: Path) -> None:
    """Take the tokenizer or the image processor along."""
    for name in COMPANIONS:
        if (source / name).is_file() and not (out / name).exists():
            shutil.copyfile(source / name, out / name)
