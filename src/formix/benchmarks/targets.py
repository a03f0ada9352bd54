"""What the CPU kernels are meant to reach, as cases and checks: `formix bench targets`.

The targets are for two threads of a processor with AMX; elsewhere the same table is made and says what is met there.
All ratios are against PyTorch in the same process, in its fused softmax attention unless another form is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from formix.benchmarks.attention import BASELINES, AttentionCase
from formix.benchmarks.isolated import measure_on, peak_memory
from formix.benchmarks.measure import Show, idle, measure
from formix.benchmarks.model import ModelCase
from formix.benchmarks.results import CEILING, Case, Check
from formix.ops import native

TARGETS = {
    1: "ReLU attention, forward",
    2: "ReLU attention, forward and backward",
    3: "gelu, softplus, sigmoid, relu2, forward",
    4: "Causal ReLU attention, and one long head",
    5: "SimA, forward",
    6: "Memory at 32,768 tokens",
    7: "Without AMX: PyTorch and formix held to AVX-512 or AVX2",
    8: "ViT-S/8 at 224 pixels, batch 8, bfloat16, against timm's softmax model",
}
TOKENS = (128, 197, 577, 785, 1024, 2048, 4096, 8192)
OTHERS = tuple(f"relu(activation={h})" for h in ("gelu", "softplus", "sigmoid", "relu2"))
DTYPES = ("bfloat16", "float32")
ISAS = ("avx512", "avx2")
# where the naive and compiled forms are timed too, and lower instruction sets against all of PyTorch
SHORT = (197, 785)
MODEL = "vit_small_patch8_224"


@dataclass(frozen=True)
class Found:
    """What the targets' measurements give."""

    cases: tuple[Case, ...]
    checks: tuple[Check, ...]


def run_targets(
    numbers: Iterable[int] = tuple(TARGETS), *, repetitions: int = 3, seconds: float = 0.4, show: Show = idle
) -> Found:
    """Measure the cases of the chosen targets and check them.

    Raises:
        ValueError: a number is no target.
    """
    chosen = sorted(set(numbers))
    if unknown := [n for n in chosen if n not in TARGETS]:
        raise ValueError(f"targets has {unknown[0]}; the targets are {', '.join(map(str, TARGETS))}.")
    attention = _attention_cases(chosen)
    cases = list(measure("attention", attention, repetitions=repetitions, seconds=seconds, show=show))
    checks: list[Check] = []
    for n in chosen:
        if n == 6:
            checks += _memory_checks()
        elif n == 7:
            held = _held(seconds * repetitions, show)
            cases += held
            checks += _isa_checks(held)
        elif n == 8:
            models = measure("model", _model_cases(), repetitions=repetitions, seconds=3 * seconds, show=show)
            cases += models
            checks += _model_checks(models)
        else:
            checks += _CHECKS[n](cases)
    return Found(tuple(cases), tuple(checks))


# ---------------------------------------------------------------------------------------------------------- cases


def _forward(tokens: int, dtype: str) -> AttentionCase:
    if tokens not in SHORT:
        return AttentionCase(tokens=tokens, dtype=dtype)
    return AttentionCase(tokens=tokens, dtype=dtype, baselines=BASELINES, isas=_isas() if dtype == "float32" else ())


def _isas() -> tuple[str, ...]:
    return tuple(isa for isa in ISAS if not native.isas().get(isa, "no kernels"))


def _sima(tokens: int, dtype: str, batch: int, *baselines: str) -> AttentionCase:
    return AttentionCase(designs=("sima",), tokens=tokens, batch=batch, dtype=dtype, baselines=baselines)


SIMA_FORMS = {dtype: _sima(196, dtype, 32, *BASELINES) for dtype in DTYPES}
SIMA_SOFTMAX = _sima(3136, "float32", 2, "softmax", "naive", CEILING)
SIMA_GROWTH = {  # the same number of tokens in all, as many short sequences and as one long one
    dtype: (_sima(196, dtype, 256, "naive"), _sima(50176, dtype, 1, "naive")) for dtype in DTYPES
}
ONE_HEAD = AttentionCase(tokens=8192, batch=1, heads=1)
CAUSAL = {dtype: [AttentionCase(tokens=n, dtype=dtype, causal=True) for n in (512, *TOKENS[4:])] for dtype in DTYPES}
BACKWARD = {dtype: [AttentionCase(tokens=n, dtype=dtype, backward=True) for n in TOKENS[1:]] for dtype in DTYPES}
MEMORY = {dtype: AttentionCase(tokens=32768, batch=1, dtype=dtype, backward=True, baselines=()) for dtype in DTYPES}
GIGABYTES = 1.5


def _attention_cases(chosen: Sequence[int]) -> list[AttentionCase]:
    cases: list[AttentionCase] = []
    if 1 in chosen:
        cases += [_forward(n, dtype) for dtype in DTYPES for n in TOKENS]
    if 2 in chosen:
        cases += [case for dtype in DTYPES for case in BACKWARD[dtype]]
    if 3 in chosen:
        cases += _activation_cases()
    if 4 in chosen:
        cases += [*(case for dtype in DTYPES for case in CAUSAL[dtype]), ONE_HEAD]
    if 5 in chosen:
        cases += [*SIMA_FORMS.values(), SIMA_SOFTMAX, *(case for pair in SIMA_GROWTH.values() for case in pair)]
    return cases


def _activation_cases() -> list[AttentionCase]:
    return [AttentionCase(designs=OTHERS, tokens=n, baselines=("softmax",)) for n in TOKENS]


def _isa_cases(isa: str) -> list[AttentionCase]:
    tokens = [n for n in TOKENS if 197 <= n <= 2048]
    return [AttentionCase(tokens=n, dtype=dtype, only=isa, baselines=("softmax",)) for dtype in DTYPES for n in tokens]


def _model_cases() -> list[ModelCase]:
    return [
        ModelCase(model=MODEL, precision="bfloat16", profiled=True),
        ModelCase(model=MODEL, precision="bfloat16", training=True, profiled=True),
        ModelCase(model=MODEL, precision="autocast"),
        ModelCase(model=MODEL, precision="autocast", training=True),
    ]


def _held(seconds: float, show: Show) -> list[Case]:
    found: list[Case] = []
    runs = _isas()
    for i, isa in enumerate(runs):
        show(i, len(runs), f"held to {isa}")
        found += measure_on(isa, _isa_cases(isa), seconds=seconds, threads=torch.get_num_threads())
    return found


# --------------------------------------------------------------------------------------------------------- checks


class _Cases:
    """Measured cases by their description."""

    def __init__(self, cases: Iterable[Case]) -> None:
        self._by_name = {case.name: case for case in cases}

    def __getitem__(self, case: AttentionCase | ModelCase) -> Case:
        return self._by_name[case.name]


def _faster(target: int, case: Case, ours: str, baseline: str, bound: float, what: str, where: str) -> Check:
    text = f"{what}: times faster than {baseline}"
    return Check(target=target, quantity=text, where=where, value=case.ratio(ours, baseline), bound=bound)


def _forward_checks(cases: Sequence[Case]) -> list[Check]:
    measured, checks = _Cases(cases), []
    bounds = {"bfloat16": (128, 3.0, 0.80), "float32": (197, 1.3, 0.85)}
    for dtype, (least, times, share) in bounds.items():
        for n in TOKENS:
            case = measured[_forward(n, dtype)]
            if n >= least:
                checks.append(_faster(1, case, "relu", "softmax", times, dtype, f"N = {n}"))
            if n >= 577:
                value = case.share("relu")
                assert value is not None
                text = f"{dtype}: share of PyTorch's matrix product"
                checks.append(Check(target=1, quantity=text, where=f"N = {n}", value=value, bound=share))
    return checks


def _backward_checks(cases: Sequence[Case]) -> list[Check]:
    measured = _Cases(cases)
    return [
        _faster(2, measured[case], "relu", "softmax", bound, dtype, f"N = {case.tokens}")
        for dtype, bound in (("bfloat16", 4.0), ("float32", 1.3))
        for case in BACKWARD[dtype]
    ]


def _activation_checks(cases: Sequence[Case]) -> list[Check]:
    measured = _Cases(cases)
    return [
        _faster(3, measured[case], name, "softmax", 2.0, f"{name}, bfloat16", f"N = {case.tokens}")
        for name in OTHERS
        for case in _activation_cases()
    ]


def _causal_checks(cases: Sequence[Case]) -> list[Check]:
    measured = _Cases(cases)
    checks = [
        _faster(4, measured[case], "relu", "softmax", bound, f"causal, {dtype}", f"N = {case.tokens}")
        for dtype, bound in (("bfloat16", 3.0), ("float32", 1.3))
        for case in CAUSAL[dtype]
    ]
    where = f"N = {ONE_HEAD.tokens}"
    return [*checks, _faster(4, measured[ONE_HEAD], "relu", "softmax", 2.5, "one head, bfloat16", where)]


def _sima_checks(cases: Sequence[Case]) -> list[Check]:
    measured, checks = _Cases(cases), []
    for form, baseline, bound in (("official", "sima, naive", 3.5), ("compiled", "sima, compiled", 1.4)):
        for dtype, case in SIMA_FORMS.items():
            text = f"{dtype}: times faster than the {form} form"
            value = measured[case].ratio("sima", baseline)
            checks.append(Check(target=5, quantity=text, where=f"N = {case.tokens}", value=value, bound=bound))
    where = f"N = {SIMA_SOFTMAX.tokens}"
    checks.append(_faster(5, measured[SIMA_SOFTMAX], "sima", "softmax", 20.0, SIMA_SOFTMAX.dtype, where))
    for dtype, (short, long) in SIMA_GROWTH.items():
        a, b = measured[short].timings["sima"], measured[long].timings["sima"]
        growth = b.median / (long.batch * long.tokens) / (a.median / (short.batch * short.tokens))
        text = f"{dtype}: growth of the time per token"
        where = f"N = {short.tokens} to {long.tokens}"
        checks.append(Check(target=5, quantity=text, where=where, value=growth, bound=1.3, at_most=True))
    return checks


def _memory_checks() -> list[Check]:
    checks = []
    for dtype, case in MEMORY.items():
        peak, _ = peak_memory(case, threads=torch.get_num_threads())
        text = f"{dtype}, 6 heads, forward and backward: GB of the whole process at its peak"
        where = f"N = {case.tokens}"
        checks.append(Check(target=6, quantity=text, where=where, value=peak / 1e9, bound=GIGABYTES, at_most=True))
    return checks


def _isa_checks(cases: Sequence[Case]) -> list[Check]:
    return [
        _faster(7, case, "relu", "softmax", 1.0, f"{s['only']}, float32", f"N = {s['tokens']}")
        for case in cases
        if (s := case.settings)["dtype"] == "float32"
    ]


def _model_checks(cases: Sequence[Case]) -> list[Check]:
    bounds = {False: ("images per second", 1.3), True: ("training step", 1.5)}
    return [
        _faster(8, case, "relu", "softmax", bounds[s["training"]][1], bounds[s["training"]][0], s["precision"])
        for case in cases
        if (s := case.settings)["precision"] == "bfloat16"
    ]


_CHECKS: dict[int, Callable[[Sequence[Case]], list[Check]]] = {
    1: _forward_checks,
    2: _backward_checks,
    3: _activation_checks,
    4: _causal_checks,
    5: _sima_checks,
}
