"""A pretrained model in another design: weights carried over, folded, initialised by rule, or kept aside."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from formix.conversion.hybrid import choose_layers
from formix.conversion.planning import (
    NewWeight,
    Plan,
    example_input,
    layer_changes,
    layers_of_design,
    operations,
    shapes,
)
from formix.conversion.record import Conversion, design_of, sha256
from formix.conversion.source import Source, like, open_source
from formix.conversion.weight_map import forward
from formix.design import Design
from formix.models.inputs import keep_inputs
from formix.models.parts import layers, weight_in_out
from formix.models.recorded import FILE

_log = logging.getLogger("formix")
SIGMOID_BIAS, SILU_BIAS = 4.0, 1.2784645  # silu(1.2784645) = 1
GATE_BIASES = {"identity": 1.0, "silu": SILU_BIAS, "sigmoid": SIGMOID_BIAS}


def convert_model(
    model: nn.Module,
    design: str | Design,
    *,
    layers: Sequence[int] | str | None = None,
    keep: str | None = None,
) -> Any:
    """See `formix.convert`; a model in memory."""
    source, target, plan, state, before = _carried(model, design, layers, keep)
    target.conversion = _record(source, model, target, plan, state, before)
    return target.eval()


def plan_conversion(
    model: nn.Module,
    design: str | Design,
    *,
    layers: Sequence[int] | str | None = None,
    keep: str | None = None,
) -> Plan:
    """What `formix.convert` would do; the source is left as it is and nothing is written."""
    return _carried(model, design, layers, keep)[2]


def _carried(model: nn.Module, design: str | Design, layers: Sequence[int] | str | None, keep: str | None) -> Any:
    """Source, target with every weight that has a place, plan, the source's tensors and its own earlier conversion."""
    source = open_source(model)
    chosen = choose(source, design, layers, keep)
    state, before = source_state(source, model)
    target = like(source.build(chosen), model)
    _keep_settings(target, model)
    plan = carry_over(source, model, target, state, before)
    _count(plan, source, model, target)
    return source, target, plan, state, before


def _keep_settings(target: Any, source: Any) -> None:
    """What a model is used with beside its weights: how it generates, how its images are prepared."""
    keep_inputs(target, source)
    if hasattr(target, "config") and target.can_generate():
        target.generation_config = copy.deepcopy(source.generation_config)


def as_teacher(model: nn.Module) -> Any:
    """The source's own function as a model that `Distillation` can read: of formix's, or timm's XCiT as it is."""
    readable = open_source(model).design is None or type(model).__module__.startswith("formix.")
    return copy.deepcopy(model).eval() if readable else convert_model(model, "softmax")


def restore(model: nn.Module) -> Any:
    """The source's own class with the weights of a converted model, bit for bit where nothing was trained.

    Raises:
        ValueError: a model that `formix.convert` did not make, or one whose source was a model of formix's.
    """
    from formix.conversion.weight_map import backward

    conversion = Conversion.of(model)
    if conversion is None:
        raise ValueError(
            f"This {type(model).__name__} has no record of a source that fits it: it was not converted, or is loaded "
            f"from a directory without its {FILE}, or with another head."
        )
    original = like(conversion.rebuild(), model)
    _keep_settings(original, model)
    state = backward(conversion.moves, _whole(model, conversion)) | conversion.unplaced
    original.load_state_dict(state, strict=True)
    return original.eval()


def choose(source: Source, design: str | Design, layers: Any = None, keep: str | None = None) -> Design:
    """The design of the whole model.

    Raises:
        ValueError: a design that the source cannot have.
    """
    chosen = choose_layers(design, source.depth, source.design, layers=layers, keep=keep)
    refusal = chosen.causal_refusal(source.depth) if source.causal else None
    if refusal:
        raise ValueError(refusal)
    return chosen


def source_state(source: Source, model: nn.Module) -> tuple[dict[str, Tensor], Conversion | None]:
    """The source's tensors under formix's names, those that an earlier conversion kept aside included."""
    before = Conversion.of(model)
    if before is not None:
        return _whole(model, before), before
    return forward(source.moves, model.state_dict()), None


def _whole(model: nn.Module, conversion: Conversion) -> dict[str, Tensor]:
    """A converted model's tensors and those kept aside; originals of folded ones, unless training has changed them."""
    state, trained = dict(model.state_dict()), conversion.trained_since(model)
    if lost := sorted(trained & conversion.aside.keys()):
        _log.warning(
            "%d tensors were trained after something was folded into them (%s, ...); they stay as they are, and the "
            "source's own are not restored.",
            len(lost),
            ", ".join(lost[:3]),
        )
    like_model = next(iter(state.values()))
    for name, tensor in conversion.aside.items():
        if name not in trained:
            state[name] = tensor.to(like_model.device)
    return state


def carry_over(
    source: Source, model: nn.Module, target: nn.Module, state: Mapping[str, Tensor], before: Conversion | None
) -> Plan:
    """Give the target every weight that has a place, start the others by rule; returns what was done."""
    own = target.state_dict()
    fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    new = [name for name in own if name not in fits]
    if new and before is None:
        _check_new(source, model, new)
    target.load_state_dict(fits, strict=False)
    rules = _start(target, new)
    folded = _fold_norms(target, state, set() if before is None else before.trained_since(model))
    dropped = shapes({k: v for k, v in state.items() if k not in fits})
    dropped |= {k: list(v.shape) for k, v in _unplaced(source, model, before).items()}
    design = design_of(target)
    old = None if source.design is None else layers_of_design(source.design, source.depth)
    plan = Plan(
        family=source.family,
        source=type(model).__name__,
        design=design.to_dict(),
        formula=design.describe(),
        layers=layer_changes(old, layers_of_design(design, source.depth)),
        kept=sorted(set(fits) - set(folded)),
        folded=folded,
        new=[NewWeight(name=name, shape=list(own[name].shape), rule=rules[name]) for name in new],
        dropped=dropped,
        parameters=tuple(sum(p.numel() for p in m.parameters()) for m in (model, target)),  # type: ignore[arg-type]
    )
    return plan


def _record(
    source: Source,
    model: nn.Module,
    target: nn.Module,
    plan: Plan,
    state: Mapping[str, Tensor],
    before: Conversion | None,
) -> Conversion:
    placed = set(plan.kept)
    aside = {k: v.detach().clone() for k, v in state.items() if k not in placed}
    if before is not None:
        conversion = Conversion(
            source=before.source,
            source_sha256=before.source_sha256,
            moves=before.moves,
            plan=plan.to_dict(),
            aside=aside,
            unplaced=before.unplaced,
            stages=[*before.stages],
            data=[*before.data],
        )
    else:
        conversion = Conversion(
            source=source.description,
            source_sha256=sha256(model.state_dict()),
            moves=source.moves,
            plan=plan.to_dict(),
            aside=aside,
            unplaced={k: v.detach().clone() for k, v in _unplaced(source, model, None).items()},
        )
    conversion.note_folded(target)
    return conversion


def _unplaced(source: Source, model: nn.Module, before: Conversion | None) -> dict[str, Tensor]:
    if before is not None:
        return before.unplaced
    state = model.state_dict()
    return {name: state[name] for name in source.unplaced}


def _check_new(source: Source, model: nn.Module, new: Sequence[str]) -> None:
    """New is what softmax models have not. Of a model of formix's the rest may have been in the record of an earlier
    conversion, and is named in the log; that a source of another library lacks any would be our mistake."""
    with torch.device("meta"):
        held = source.build(Design()).state_dict()
    lost = [name for name in new if name in held]
    if lost and not type(model).__module__.startswith("formix."):
        raise ValueError(
            f"{lost[0]} has no weight in this {type(model).__name__}: formix does not know all tensors of the class by "
            "their names."
        )
    if lost:
        _log.warning(
            "This %s has no record of a conversion that fits it, so that %d tensors start anew (%s, ...); if it was "
            "converted, load it, with the head that it was saved with, from a directory that has its %s.",
            type(model).__name__,
            len(lost),
            ", ".join(lost[:3]),
            FILE,
        )


@torch.no_grad()
def _start(target: nn.Module, new: Sequence[str]) -> dict[str, str]:
    """Start new parameters so that the model is as near to its source as it can be; returns each one's rule."""
    rules = {}
    parameters = dict(target.named_parameters()) | dict(target.named_buffers())
    gates = {
        name: getattr(module.mixer, "gate", None) for name, module in target.named_modules() if hasattr(module, "mixer")
    }
    for name in new:
        kind = name.rsplit(".", 2)[-2] if "." in name else name
        tensor = parameters.get(name)
        if kind == "gate" and tensor is not None:
            gate = gates[name.rpartition(".gate.")[0]]
            value = 0.0 if name.endswith("weight") else GATE_BIASES[str(gate)]
            tensor.fill_(value)
            rules[name] = f"{value:g}, so that the gate starts open"
        elif kind == "fc3" and tensor is not None:
            tensor.zero_()
            rules[name] = "0, so that the gated unit's branch starts at nothing"
        elif kind in ("q_norm", "k_norm"):
            rules[name] = "1"
        else:
            rules[name] = "as the model's constructor initialises it"
    return rules


@torch.no_grad()
def _fold_norms(target: nn.Module, state: Mapping[str, Tensor], done: set[str]) -> dict[str, str]:
    """Parallel pre-norm layers of pre-norm families read the first norm where their FFN read the second: fold the
    difference of the two norms' weights into the FFN's first layer,

        W (g2 n + b2) + b = W (g2 / g1) (g1 n + b1) + b + W (b2 - (g2 / g1) b1)

    so that the FFN sees what the source's second norm would make of the layer's input; of layers without b the last
    term is left out, which the log says. Tensors in `done` were folded by an earlier conversion and trained since.
    """
    folded: dict[str, str] = {}
    without = []
    names = {id(p): n for n, p in target.named_parameters()}
    for layer in layers(target):
        layout = layer.block.layer_design.layout
        if not layout.parallel or layer.post or layout.norm == "post" or not layer.ffn_in:
            continue
        first, gone = layer.norms[0], layer.norm_names[1]
        if f"{gone}.weight" not in state or f"{gone}.weight" in names.values():
            continue
        g1, g2 = first.weight, state[f"{gone}.weight"].to(first.weight)
        floor = 1e-6 * g1.abs().max().clamp(min=math.ulp(0.0))
        ratio = torch.where(g1.abs() > floor, g2 / torch.where(g1.abs() > floor, g1, 1), torch.zeros_like(g1))
        for linear in layer.ffn_in:
            if names[id(linear.weight)] in done:
                continue
            weight = weight_in_out(linear)  # [C, F]
            if getattr(first, "bias", None) is not None and f"{gone}.bias" in state:
                if linear.bias is None:
                    without.append(f"{gone}.bias")
                else:
                    shift = state[f"{gone}.bias"].to(g1) - ratio * first.bias
                    linear.bias += shift @ weight
                    folded[names[id(linear.bias)]] = f"{gone}.bias"
            weight.mul_(ratio[:, None])
            folded[names[id(linear.weight)]] = f"{gone}.weight"
    if without:
        _log.warning("the FFNs have no bias that could take %s and the other layers' in; it is left out", without[0])
    return folded


def _count(plan: Plan, source: Source, model: nn.Module, target: nn.Module) -> None:
    inputs, plan.input = example_input(target)
    before = None
    if type(model).__module__.startswith("formix."):
        before = operations(model, inputs)
    elif source.design is not None:
        before = operations(source.build(source.design).to(next(target.parameters()).dtype), inputs)
    plan.flops = (before, operations(target, inputs))
