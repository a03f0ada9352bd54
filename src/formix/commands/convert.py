"""`formix convert`: a pretrained model, in another design."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formix.commands.arguments import names, parse, split_one

if TYPE_CHECKING:
    from formix.conversion.output import ConversionDirectory

MEASURING = ("tokenizer", "sequence_length", "img_size", "on_bad_sample", "seed")  # of recovery, for metrics alone
# of the configuration: where things are and how they are shown, which leaves the outcome as it is
ELSEWHERE = ("source", "checkpoint", "task", "model_args", "out", "dry_run", "threads", "record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """A pretrained model with its blocks in another design."""

    source: str  # a directory (timm, transformers, formix, a training run), a timm name or a transformers id
    design: str  # a design's name or combination; several with commas, each to a directory of its own in out
    out: str | None = None  # the directory of the result
    dry_run: bool = False  # print the plan and write nothing
    layers: str | None = None  # layers to convert, as 0,2,4-7; None: all
    keep: str | None = None  # layers that stay as they are, as softmax:0,1
    checkpoint: str | None = None  # a file of weights for a timm name, in place of the published ones
    task: str | None = None  # transformers' class, such as BertForMaskedLM; None: the one that the config names
    model_args: dict[str, Any] = field(default_factory=dict)  # arguments for a timm name: {num_classes: 0}
    recover: str | None = None  # data for recovery by distillation, as glue:DIR/TASK+text:PATH or folder:PATH
    # its settings (docs/conversion.md): {stages: "match:240s:5e-4,align:900s:3e-4"} is the default, with stages "" the
    # model is calibrated alone
    recovery: dict[str, Any] = field(default_factory=dict)
    sts: str | None = None  # an STS-B file: Spearman correlation of mean-pooled sentence embeddings, at every step
    probe: str | None = None  # labelled images: accuracy of a linear probe on the features, at every step
    perplexity: str | None = None  # text:PATH for a decoder's perplexity, at every step
    threads: int | None = None  # CPU threads; None: PyTorch's choice
    search: int | None = None  # convert up to so many layers, those that hurt least first (needs --recover's data)
    max_loss: float | None = None  # of the search: the largest loss to the source, end to end
    max_milliseconds: float | None = None  # of the search: how long a forward pass on a batch may take
    record: str | None = None  # a directory for the records of studies and the table over them

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= 4096:
            raise ValueError(f"threads is {self.threads}; it must be 1 to 4096.")
        if self.search is None and (self.max_loss is not None or self.max_milliseconds is not None):
            raise ValueError("max_loss and max_milliseconds are budgets of a search; give --search=N too.")
        if self.search is not None and (self.recover is None or self.layers is not None or self.keep is not None):
            raise ValueError(
                "--search needs --recover=DATA, and chooses the layers itself: leave out --layers and --keep."
            )
        if self.recover is None and (foreign := sorted(set(self.recovery) - set(MEASURING))):
            raise ValueError(
                f"recovery has {', '.join(map(repr, foreign))} but there is no recovery; give --recover=DATA too."
            )


def convert(arguments: list[str]) -> int:
    """Convert a pretrained model to another design."""
    import torch

    from formix.conversion.carry import choose, plan_conversion
    from formix.conversion.load import files_beside, load_source
    from formix.conversion.output import ConversionDirectory
    from formix.conversion.source import open_source
    from formix.models.text import check_length
    from formix.training.job import trained_model

    study, config = _config(arguments)
    directory, run = trained_model(Path(config.source))
    if run:
        config = dataclasses.replace(config, source=str(directory))
    if config.out is None and not config.dry_run:
        raise ValueError("out is missing; give --out=DIR, or --dry-run to see the plan.")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    designs = names(config.design, "design")
    places = {name: Path(str(config.out)) / name if len(designs) > 1 else Path(str(config.out)) for name in designs}
    outs = {} if config.dry_run else {name: ConversionDirectory(places[name], config.source) for name in designs}
    recovery, _ = _recovery(config)
    torch.manual_seed(recovery.seed)  # of a head that the source's weights lack
    source = load_source(config.source, checkpoint=config.checkpoint, task=config.task, **config.model_args)
    named = config.source
    if not config.dry_run:
        config = dataclasses.replace(config, source=str(files_beside(named, source)))
    _refuse_metrics(source, config)
    opened = open_source(source)
    for design in designs:  # before the first of them takes its time
        choose(opened, design, config.layers, config.keep)
    if config.recover is not None or config.perplexity is not None:
        check_length(source, recovery.sequence_length)
    for design in designs:
        if config.dry_run:
            print(plan_conversion(source, design, layers=config.layers, keep=config.keep))
            if config.search is not None:
                print(f"Of these layers --search converts those that hurt least, {config.search} at most.")
            continue
        _convert(source, named, dataclasses.replace(config, design=design), study, outs[design])
    return 0


def _config(arguments: list[str]) -> tuple[str, ConvertConfig]:
    """The name of the study and what it asks for; what stands without a flag is a source or a study's YAML."""
    first, flags = split_one("convert", arguments, ConvertConfig)
    if first is not None and first.endswith((".yaml", ".yml")):
        if not Path(first).is_file():
            raise ValueError(f"{first} is no file; give a study's YAML.")
        return Path(first).stem, parse(ConvertConfig, "convert", ["--config", first, *flags])
    config = parse(ConvertConfig, "convert", flags if first is None else [f"--source={first}", *flags])
    return Path(config.source).name, config


def _convert(source: Any, named: str, config: ConvertConfig, study: str, out: ConversionDirectory) -> None:
    from formix.conversion.record import Conversion
    from formix.conversion.report import measure_speed
    from formix.conversion.summary import write_record

    request = _request(source, config)
    conversion = out.finished(request)
    if conversion is not None:
        print(f"{out.path} holds this conversion already; remove it to convert again.")
    else:
        model = _converted(source, config, out, request)
        conversion = model.conversion
        conversion.request = request
        if Conversion.of(source) is None:  # else that of an earlier conversion is named
            conversion.source |= {"place": named, "checkpoint": config.checkpoint}
        if config.recover is not None:
            conversion.speed = measure_speed(source, model)
        out.save(model)
    recovery, _ = _recovery(config)
    out.complete(conversion, Path(config.source), recovery.tokenizer)
    if config.record is not None:
        write_record(conversion, Path(config.record), study, config.design)
    print(f"{out.path}: {conversion.plan['formula']}")
    for step, values in conversion.metrics.items():
        if values:
            print(f"  {step:12}" + "".join(f"  {name} {value:.4f}" for name, value in values.items()))


def _request(source: Any, config: ConvertConfig) -> dict[str, Any]:
    """What is to be made of which weights, as plain data."""
    from formix.conversion.record import sha256

    asked = {k: v for k, v in dataclasses.asdict(config).items() if k not in ELSEWHERE}
    return json.loads(json.dumps({**asked, "weights": sha256(source.state_dict())}))


def _converted(source: Any, config: ConvertConfig, out: ConversionDirectory, request: dict[str, Any]) -> Any:
    import torch

    from formix.commands.progress import stage_progress
    from formix.conversion.carry import as_teacher, convert_model
    from formix.conversion.pipeline import run

    layers = config.layers if config.search is None else _searched(source, config, out, request)
    recovery, place = _recovery(config)
    metrics = _metrics(config)
    if config.recover is None:
        torch.manual_seed(recovery.seed)
        model = convert_model(source, config.design, layers=layers, keep=config.keep)
        if metrics:
            steps = {"source": as_teacher(source), "converted": model}
            model.conversion.metrics = {
                step: {name: metric(current) for name, metric in metrics.items()} for step, current in steps.items()
            }
        return model
    with stage_progress() as show:
        return run(
            source, config.design, recovery, layers=layers, keep=config.keep, place=place, state=out.recovery,
            metrics=metrics, on_progress=show,
        )  # fmt: skip


def _searched(source: Any, config: ConvertConfig, out: ConversionDirectory, request: dict[str, Any]) -> list[int]:
    """The layers that a search chose; its curve is printed and kept beside the model."""
    import itertools

    import torch

    from formix.conversion.carry import as_teacher
    from formix.conversion.pipeline import calibration_batches, load_recovery_data
    from formix.conversion.search import search
    from formix.records import write_atomically

    if (before := out.found(request)) is not None:
        return before
    recovery, place = _recovery(config)
    data, batch_size = load_recovery_data(as_teacher(source), recovery, place)
    loader = calibration_batches(data, batch_size, recovery.seed)
    torch.manual_seed(recovery.seed)
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
    if not found.chosen and config.max_milliseconds is not None:
        raise ValueError(
            f"A forward pass of the source takes {found.curve[0].milliseconds:.2f} ms, so that no layer need be "
            f"converted for max_milliseconds={config.max_milliseconds:g}; ask for less."
        )
    if not found.chosen:
        raise ValueError(f"No layer can be converted within max_loss={config.max_loss:g}; allow more or recover first.")
    out.path.mkdir(parents=True, exist_ok=True)
    write_atomically(out.search, json.dumps({**found.to_dict(), "request": request}, indent=1) + "\n")
    return found.chosen


def _recovery(config: ConvertConfig) -> tuple[Any, str | None]:
    """The settings of recovery, and the directory that the source is."""
    from formix.conversion.pipeline import Recovery

    known = {f.name for f in dataclasses.fields(Recovery)} - {"data"}
    if unknown := sorted(set(config.recovery) - known):
        raise ValueError(f"recovery has {', '.join(map(repr, unknown))}; it takes {', '.join(sorted(known))}.")
    place = config.source if Path(config.source).is_dir() else None
    given = {"data": config.recover or "", **config.recovery}
    flags = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items()]
    return parse(Recovery, "convert", flags), place


def _refuse_metrics(source: Any, config: ConvertConfig) -> None:
    """Raise `ValueError` for a measure, or a setting of recovery, of another kind of model."""
    from formix.evaluation.suitable import reads_text

    text = reads_text(source)
    setting, kind = ("img_size", "images") if text else ("tokenizer", "text")
    if config.recovery.get(setting) is not None:
        raise ValueError(
            f"{setting} is for models of {kind}, and the source is a {type(source).__name__}; leave it out."
        )
    measures = {
        "sts": (text, "models of text"),
        "probe": (not text, "models of images"),
        "perplexity": (text and source.can_generate(), "language models that write"),
    }
    for name, (fits, kind) in measures.items():
        if getattr(config, name) is not None and not fits:
            raise ValueError(f"{name} is for {kind}, and the source is a {type(source).__name__}; leave it out.")


def _metrics(config: ConvertConfig) -> dict[str, Any]:
    from formix.conversion.metrics import metrics_for
    from formix.conversion.pipeline import tokenizer_place

    recovery, place = _recovery(config)
    return metrics_for(
        tokenizer=tokenizer_place(recovery, place) if config.sts or config.perplexity else None,
        sts=config.sts,
        probe=config.probe,
        perplexity=config.perplexity,
        sequence_length=recovery.sequence_length,
        img_size=recovery.img_size,
        on_bad_sample=recovery.on_bad_sample,
    )
