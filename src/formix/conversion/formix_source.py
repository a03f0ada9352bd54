"""Sources of formix itself: a model in one design, asked for in another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from formix.conversion.record import Conversion
from formix.conversion.source import Source
from formix.conversion.weight_map import Move
from formix.design import Design
from formix.design import design as find_design


def open_formix(model: Any) -> Source:
    """The source for a model of formix's; one that was converted before brings back what was left out then.

    Raises:
        ValueError: a published model whose weights belong to its own design (Activator, the ReLU ViT), or one whose
            heads for skip wiring were pruned.
    """
    from formix.conversion.timm_source import pooled
    from formix.models import vit
    from formix.models.designed import Designed
    from formix.models.parts import find_layers
    from formix.models.xcit import FormixXcit

    if getattr(getattr(model, "config", None), "pruned_kv", False):
        raise ValueError(
            "This model was pruned for its own skip wiring and lacks projections that another design reads; start "
            "from the model that was pruned."
        )
    before = Conversion.of(model)
    if isinstance(model, Designed):
        if not find_layers(model):  # type: ignore[arg-type]
            raise ValueError(
                f"{model.base!r} has blocks of several branches, and formix converts those of one attention and one "
                "FFN; its weights as they are go into another design by formix.create_model(DIRECTORY, design=...)."
            )
        arguments = model.saved_config()["model_args"]
        base = arguments.pop("base")
        del arguments["design"]
        depth = len(model.blocks)  # type: ignore[attr-defined]
        if before is not None and not model.design.mixes_tokens(depth):  # the pooling was changed for this design
            arguments.pop("fc_norm", None)
            arguments["global_pool"] = before.source.get("arguments", {}).get("global_pool", "token")

        def build_vit(design: Design) -> Any:
            return vit.create_vit(base, design, **pooled(arguments, design, depth))

        return _source(model, before, "vit", depth, model.design, build_vit)
    if isinstance(model, FormixXcit) and model.architecture == "formix_xcit":
        import timm

        given = model.saved_config()["model_args"]
        official = model.design.official  # type: ignore[union-attr]

        def build_xcit(design: Design) -> Any:
            return timm.create_model(
                "formix_xcit", **{**given, "design": dataclasses.replace(design, official=official)}
            )

        return _source(model, before, "xcit", len(model.blocks), model.design, build_xcit)
    config = getattr(model, "config", None)
    family = str(getattr(config, "model_type", "")).removeprefix("formix_")
    from formix.models.text import FAMILIES

    if family not in FAMILIES:
        raise ValueError(f"A {type(model).__name__} has no other design: its weights belong to the published one.")
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "design", "architectures")}  # type: ignore[union-attr]

    def build(design: Design) -> Any:
        built = type(model)(type(config)(**fields, design=design.to_dict()))  # type: ignore[misc]
        trunk, ours = (getattr(m, m.base_model_prefix, m) for m in (model, built))
        if hasattr(trunk, "pooler") and trunk.pooler is None:
            ours.pooler = None
        return built

    return _source(model, before, family, config.num_hidden_layers, find_design(config.design), build)  # type: ignore[union-attr]


def _source(
    model: Any, before: Conversion | None, family: str, depth: int, design: Any, build: Callable[[Design], Any]
) -> Source:
    from formix.models.text import DECODERS

    own = {"library": "formix", "class": type(model).__name__, "design": design.to_dict()}
    return Source(
        family=family,
        depth=depth,
        causal=family in DECODERS,
        design=design,
        build=build,
        rebuild=lambda: build(design),
        description=own if before is None else before.source,
        moves=[Move(sources=(name,), target=name) for name in model.state_dict()],
    )
