"""A pretrained model, in another design: `formix.convert`, and what `formix convert` does on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from formix.conversion.planning import Plan
    from formix.design import Design

__all__ = ["convert", "plan", "restore"]


def convert(
    model: Any, design: str | Design, *, layers: Sequence[int] | str | None = None, keep: str | None = None
) -> Any:
    """A pretrained model with its blocks in `design`, all weights that have a place carried over.

    The result is a model of formix's in evaluation mode: `formix.save` writes it with its record (conversion.json).
    Weights that the design has no place for are kept aside in `model.conversion`, so that converting back to
    "softmax", or `formix.conversion.restore`, gives the source's tensors bit for bit where nothing was trained.

    Args:
        model: a model of timm's (VisionTransformer, VisionTransformerRelPos, Eva, Xcit), transformers' (BERT, RoBERTa,
            XLM-RoBERTa, CamemBERT, DistilBERT, ViT, DeiT, DINOv2, DINOv3, GPT-2, Llama, Qwen2, Qwen3, Mistral) or
            formix's; or a directory (a training run's among them), timm name or transformers id of one.
        design: a design's name, combination or `Design`.
        layers: numbers of the layers to convert ("0,2,4-7" or a sequence); None: all.
        keep: "softmax:0,1": layers that stay as they are.

    Raises:
        ValueError: a source that cannot be converted (quantised, wrapped, compiled, unknown) or a design that cannot
            serve it (SimA in a decoder).
    """
    from formix.conversion.carry import convert_model

    return convert_model(_opened(model), design, layers=layers, keep=keep)


def plan(
    model: Any, design: str | Design, *, layers: Sequence[int] | str | None = None, keep: str | None = None
) -> Plan:
    """What `convert` would do with these arguments: layers changed, weights kept, folded, new and dropped."""
    from formix.conversion.carry import plan_conversion

    return plan_conversion(_opened(model), design, layers=layers, keep=keep)


def restore(model: Any) -> Any:
    """The source's own class (timm's or transformers') with the weights of a converted model or its directory."""
    from formix.conversion.carry import restore as run

    return run(_opened(model))


def _opened(model: Any) -> Any:
    if isinstance(model, str | Path):
        from formix.conversion.load import load_source
        from formix.training.job import trained_model

        directory, run = trained_model(Path(model))
        return load_source(directory if run else model)
    return model
