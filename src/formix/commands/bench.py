"""`formix bench`: times of attention operators, blocks and models against PyTorch's own."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from formix.commands.arguments import names, numbers, parse

if TYPE_CHECKING:
    from formix.benchmarks.measure import Measurable, Show
    from formix.benchmarks.results import Benchmark, Case, Check


@dataclass(frozen=True, kw_only=True)
class _Common:
    threads: int | None = None  # CPU threads; None: PyTorch's choice
    repetitions: int = 3  # passes over all cases
    seconds: float = 1.0  # for a case in one repetition, one round at least
    out: str | None = None  # a directory for results.json, README.md and chart.html
    compare: str | None = None  # an earlier results.json to print the differences to

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("repetitions", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be {least} or more.")
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}; it must be above 0.")


@dataclass(frozen=True, kw_only=True)
class _OnDevice(_Common):
    device: str = "cpu"  # or cuda, cuda:1, ...

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)


@dataclass(frozen=True, kw_only=True)
class AttentionBench(_OnDevice):
    """Time attention operators against PyTorch's fused softmax, the plain and the compiled form and matrix product."""

    designs: str = "relu"  # with commas, each a pointwise design or sima, such as 'relu,relu(activation=gelu),sima'
    tokens: str = "197,785,2048"  # numbers of tokens, with commas
    batch: int = 2  # sequences
    heads: int = 6  # heads of each
    head_size: int = 64  # channels of each
    dtypes: str = "bfloat16,float32"  # of float32, bfloat16 and float16
    passes: Literal["forward", "backward", "both"] = "forward"  # backward: forward and backward together
    causal: bool = False  # query i sees keys 0 to i
    layout: Literal["packed", "contiguous"] = "packed"  # of query, key and value
    baselines: str = "softmax,naive,compiled,matmul"  # what to compare with
    isas: str = ""  # also the first design on these instruction sets of formix (see `formix implementations`)


@dataclass(frozen=True, kw_only=True)
class BlockBench(_OnDevice):
    """Time transformer blocks of several designs against the softmax block."""

    designs: str = "relu,sima"  # with commas
    tokens: str = "197,785"  # numbers of tokens, with commas
    batch: int = 8  # sequences
    dim: int = 384  # channels of a token
    heads: int = 6  # heads
    mlp_ratio: float = 4.0  # width of the FFN over dim
    precisions: str = "bfloat16"  # of float32, bfloat16 and autocast
    training: bool = False  # forward and backward instead of forward
    profile: bool = False  # also where the time goes


@dataclass(frozen=True, kw_only=True)
class ModelBench(_OnDevice):
    """Time whole models of several designs against the softmax model, timm's own where it has one."""

    model: str = "vit_small_patch8_224"  # a name that formix.create_model takes
    model_args: dict[str, Any] = field(default_factory=dict)  # its further arguments
    designs: str = "relu"  # with commas
    batch: int = 8  # images or sequences
    tokens: int = 128  # of a sequence
    precisions: str = "bfloat16"  # of float32, bfloat16 and autocast
    training: bool = False  # a training step instead of a forward pass
    profile: bool = False  # also where the time goes


@dataclass(frozen=True, kw_only=True)
class ConvertedBench(_OnDevice):
    """Time converted models against the classes of timm and transformers that they were converted from."""

    directories: str = ""  # that formix convert has written, with commas
    tokens: str = "128,512"  # of a text
    img_sizes: str = ""  # sides of images, with commas; the model's own if empty
    batch: int = 1  # images or sequences
    precisions: str = "bfloat16"  # of float32 and bfloat16


@dataclass(frozen=True, kw_only=True)
class TargetsBench(_Common):
    """Measure what the CPU kernels are meant to reach, and say which targets they meet."""

    targets: str = "1,2,3,4,5,6,7,8"  # numbers of the targets, with commas
    seconds: float = 0.4  # for a case in one repetition, one round at least


def check_device(name: str) -> None:
    """Raise `ValueError` for a device on which nothing can be timed here."""
    import torch

    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or name.startswith("cpu:"):
        raise ValueError(f"device is {name!r}; it must be cpu, cuda, or cuda:1 and so on.")
    if kind == "cuda" and int(number or 0) >= (there := torch.cuda.device_count()):
        raise ValueError(f"device is {name!r}, and PyTorch {torch.__version__} finds {there} CUDA devices here.")


BENCHES = {
    "attention": AttentionBench,
    "block": BlockBench,
    "model": ModelBench,
    "converted": ConvertedBench,
    "targets": TargetsBench,
}


def bench(arguments: list[str]) -> int:
    """Time attention operators, blocks or models against PyTorch's own softmax attention."""
    import torch

    what, *flags = arguments or [""]
    if what in ("-h", "--help"):
        print("\n".join(f"formix bench {name:10} {kind.__doc__}" for name, kind in BENCHES.items()))
        return 0
    if what not in BENCHES:
        raise ValueError(f"usage: formix bench {'|'.join(BENCHES)} [flags]; {what!r} is none of them.")
    config = parse(BENCHES[what], f"bench {what}", flags)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return _run(what, config, f"formix bench {shlex.join(arguments)}")


def _run(what: str, config: Any, command: str) -> int:
    from rich.console import Console

    from formix import records
    from formix.benchmarks.chart import chart_page
    from formix.benchmarks.results import Benchmark
    from formix.benchmarks.tables import comparison_table, page, terminal_tables
    from formix.conversion.summary import refresh_summary
    from formix.environment import capture_environment
    from formix.ops import native

    before = None if config.compare is None else records.read(Benchmark, config.compare, "formix bench")
    with _progress() as show:
        cases, checks = _measure(what, config, before, show)
    usable, isa = native.available()
    benchmark = Benchmark(
        command=command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment=capture_environment(),
        isa=isa if usable else None,
        config=asdict(config),
        cases=tuple(cases),
        checks=tuple(checks),
    )
    console = Console()
    for table in terminal_tables(benchmark):
        console.print(table)
    if config.out is not None:
        out = Path(config.out)
        records.write(benchmark, out / "results.json")
        records.write_atomically(out / "README.md", page(benchmark))
        if (chart := chart_page(benchmark)) is not None:
            records.write_atomically(out / "chart.html", chart)
        if what == "converted":
            refresh_summary(out.parent)
        console.print(f"Results: {out}", soft_wrap=True, markup=False)
    if before is not None:
        console.print(comparison_table(before, benchmark))
    return 0


def _measure(
    what: str, config: Any, before: Benchmark | None, show: Show
) -> tuple[tuple[Case, ...], tuple[Check, ...]]:
    from formix.benchmarks.measure import measure
    from formix.benchmarks.targets import run_targets

    passes = {"repetitions": config.repetitions, "seconds": config.seconds, "show": show}
    if what == "targets":
        found = run_targets(numbers(config.targets, "targets"), **passes)
        return found.cases, found.checks
    cases: list[Measurable] = CASES[what](config)
    if before is not None and not {case.name for case in cases} & {case.name for case in before.cases}:
        raise ValueError(
            f"{config.compare} has no case in common with this benchmark, whose first is {cases[0].name!r} and that of "
            f"the file {before.cases[0].name if before.cases else None!r}; give both the same settings and designs."
        )
    return measure(what, cases, **passes), ()  # type: ignore[arg-type]


def _attention(config: AttentionBench) -> list[Any]:
    from formix.benchmarks.attention import AttentionCase

    return [
        AttentionCase(
            designs=names(config.designs, "designs"),
            baselines=names(config.baselines, "baselines"),
            isas=names(config.isas, "isas", empty=True),
            tokens=tokens,
            batch=config.batch,
            heads=config.heads,
            head_size=config.head_size,
            dtype=dtype,
            backward=backward,
            causal=config.causal,
            layout=config.layout,
            device=config.device,
        )
        for backward in {"forward": (False,), "backward": (True,), "both": (False, True)}[config.passes]
        for dtype in names(config.dtypes, "dtypes")
        for tokens in numbers(config.tokens, "tokens")
    ]


def _blocks(config: BlockBench) -> list[Any]:
    from formix.benchmarks.model import BlockCase

    return [
        BlockCase(
            designs=names(config.designs, "designs"),
            tokens=tokens,
            batch=config.batch,
            dim=config.dim,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            precision=precision,
            training=config.training,
            profiled=config.profile,
            device=config.device,
        )
        for precision in names(config.precisions, "precisions")
        for tokens in numbers(config.tokens, "tokens")
    ]


def _models(config: ModelBench) -> list[Any]:
    from formix.benchmarks.model import ModelCase

    return [
        ModelCase(
            model=config.model,
            designs=names(config.designs, "designs"),
            batch=config.batch,
            tokens=config.tokens,
            precision=precision,
            training=config.training,
            model_args=config.model_args,
            profiled=config.profile,
            device=config.device,
        )
        for precision in names(config.precisions, "precisions")
    ]


def _converted(config: ConvertedBench) -> list[Any]:
    from formix.conversion.latency import converted_cases

    return [
        case
        for directory in names(config.directories, "directories")
        for precision in names(config.precisions, "precisions")
        for case in converted_cases(
            directory,
            tokens=numbers(config.tokens, "tokens"),
            img_sizes=numbers(config.img_sizes, "img_sizes") if config.img_sizes else (None,),
            batch=config.batch,
            precision=precision,
            device=config.device,
        )
    ]


CASES: dict[str, Callable[[Any], list[Any]]] = {
    "attention": _attention,
    "block": _blocks,
    "model": _models,
    "converted": _converted,
}


@contextmanager
def _progress() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(file=sys.stderr), transient=True, refresh_per_second=1) as bar:
        task = bar.add_task("starting", total=None)

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, description=name, total=total, completed=done)

        yield show
