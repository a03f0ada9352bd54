"""formix's entries in timm's model registry, made when this module is imported.

The entry points import the models only when called: timm is still being imported when they are registered.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from timm.models import generate_default_cfgs, register_model

from formix.models.published import IMAGENET, PUBLISHED, SYMMETRIC, timm_cfg

__all__ = ["formix_vit"]

default_cfgs = generate_default_cfgs(
    {
        "formix_vit": timm_cfg(224, 1000, "patch_embed.proj", "head", SYMMETRIC),
        "formix_xcit": timm_cfg(224, 1000, "patch_embed.proj.0.0", "head", IMAGENET),
        **{name: published.cfg for name, published in PUBLISHED.items()},
    }
)


@register_model
def formix_vit(pretrained: bool = False, **kwargs: Any) -> Any:
    """``timm.create_model("formix_vit", base="vit_small_patch16_224", design="relu")``, and what
    ``timm.create_model("local-dir:DIR", pretrained=True)`` calls for a directory that `formix.save` wrote."""
    from formix.models.vit import build_for_timm

    return build_for_timm(pretrained=pretrained, **kwargs)


def _entry(name: str, module: str) -> Callable[..., Any]:
    """An entry point that has `module` build the model; timm adds its checkpoint and feature handling."""

    def entry(pretrained: bool = False, **kwargs: Any) -> Any:
        from timm.models import build_model_with_cfg

        from formix.models.recorded import remember_record

        model: Any = build_model_with_cfg(
            functools.partial(importlib.import_module(module).build, name),
            name,
            pretrained,
            feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
            pretrained_filter_fn=lambda state, model: model.adapt_checkpoint(state),
            **kwargs,
        )
        if pretrained and hasattr(model, "pretrained_cfg"):
            remember_record(model, dict(model.pretrained_cfg).get("file"))
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = __name__  # timm looks for the default_cfgs in the entry point's module
    entry.__doc__ = f"The model {name} of {module}."
    return entry


ENTRIES = {
    "formix_xcit": _entry("formix_xcit", "formix.models.xcit"),
    **{name: _entry(name, published.module) for name, published in PUBLISHED.items()},
}
for _function in ENTRIES.values():
    register_model(_function)
