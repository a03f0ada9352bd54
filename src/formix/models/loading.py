"""A config of transformers' as one of formix's models: which fields it takes, and that no weight stays random."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

_log = logging.getLogger("formix")


def known_fields(config_class: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config as its class calls them; timm's num_classes is num_labels.

    Raises:
        ValueError: a name that is no field.
    """
    fields = {"num_labels" if name == "num_classes" else name: value for name, value in given.items()}
    known = set(config_class().to_dict()) | set(config_class.attribute_map) | {"num_labels", "problem_type"}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"{', '.join(map(repr, unknown))}: no field of {config_class.__name__}.")
    return {config_class.attribute_map.get(name, name): value for name, value in fields.items()}


@contextlib.contextmanager
def refusals_named(name: str, config: Mapping[str, Any]) -> Iterator[None]:
    """What transformers and torch raise for fields that no model can have, as a `ValueError` that names them."""
    try:
        yield
    except (StrictDataclassError, TypeError, LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name!r} cannot be built with {dict(config)}: {reason}") from None


def read_weights(model_class: Any, directory: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """transformers' `from_pretrained` on the directory's files alone: the model, and what it says of loading.

    Raises:
        ValueError: the files cannot be read; nothing that they hold is executed.
    """
    try:
        return model_class.from_pretrained(directory, local_files_only=True, output_loading_info=True, **options)
    except (pickle.UnpicklingError, LookupError, EOFError, OSError) as error:  # damaged pickles raise any of these
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['empty'])[0]}"
        raise ValueError(f"The weights in {directory} cannot be read ({reason}); save the model again.") from None


def check_loaded(
    model: Any, report: Mapping[str, Any], directory: Path, *, layers: str, whole: bool, new_head: bool
) -> None:
    """Announce in the log the weights of layers that had no place in `model`.

    Args:
        report: what transformers' `from_pretrained` says of loading.
        layers: the name of the list of layers in the names of parameters.
        whole: the directory must bring every weight, and none besides; else all but those of a new head or pooler.
        new_head: the caller asked for a head, whose weights the directory need not have.

    Raises:
        ValueError: the directory has weights of another shape, or lacks some; with `whole`, if its layers have more.
    """
    inside = "" if model.base_model is model else f"{model.base_model_prefix}."
    if unfit := sorted(k for k, *_ in report["mismatched_keys"] if k.startswith(inside)):
        raise ValueError(f"{directory} has weights of another shape for {len(unfit)} parameters ({unfit[0]}, ...).")
    missing = sorted(k for k in report["missing_keys"] if whole or (k.startswith(inside) and ".pooler." not in f".{k}"))
    if missing:
        raise ValueError(
            f"{directory} has no weights for {len(missing)} parameters of this design ({', '.join(missing[:3])}, ...): "
            "they would stay random. Train the design from scratch or convert the model."
        )
    headless = sorted(k for k in report["missing_keys"] if not k.startswith(inside))
    if headless and not new_head:
        raise ValueError(
            f"{directory} has no weights for the head of a {type(model).__name__} ({', '.join(headless[:3])}, ...): it "
            "would be random. Give task: the one whose head you train anew, or 'features' for a model without a head."
        )
    homeless = sorted(k for k in report["unexpected_keys"] if f".{layers}." in f".{k}")
    if homeless and whole:
        raise ValueError(
            f"{directory} has {len(homeless)} weights that its config.json has no place for ({homeless[0]}, ...): one "
            "of the two is damaged or of another model; save the model again."
        )
    if homeless:
        _log.warning("weights without a place in this design: %s", ", ".join(homeless))
