"""From a model to a file of another runtime, and the description beside it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_torch_version

from formix.design import Design
from formix.design import design as find_design
from formix.environment import version_of
from formix.export import formats, verify
from formix.export.cached import CachedProgram
from formix.export.program import ImageProgram, Program, TextProgram, output_ports, trace, unread
from formix.export.sheet import Sheet
from formix.export.source import Source, read_source
from formix.ops.registry import native_module, portable
from formix.records import plain, write

_log = logging.getLogger("formix")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.")  # one of these makes it
PACKAGES = ("formix", "torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino")


def export_model(
    source: Any,
    out: str | Path,
    *,
    format: str | None = None,
    dtype: str | None = None,
    batch: int | None = None,
    tokens: int | None = None,
    img_size: int | None = None,
    opset: int | None = None,
    tolerance: float | None = None,
    kernels: bool = False,
    cache: bool = False,
) -> Sheet:
    """Write a model for another runtime, run the file, and compare it with the model.

    The file holds PyTorch's operators (ONNX's, OpenVINO's) alone: attention is the plain form that formix's kernels are
    tested against. Batch and tokens may be of any size unless they are fixed here; images have the model's own size.
    Without `cache` every call of a decoder computes all its tokens.

    Args:
        source: a directory that `formix.save`, `formix train` or `formix convert` wrote, or a model.
        out: a file (.pt2, .onnx, .xml), or a directory, where it is model.pt2 and so on. Beside it go a JSON file of
            the same name (`Sheet`) and the directory's tokenizer or image processor.
        format: "torch", "onnx" or "openvino"; None: by the name of the file.
        dtype: of the weights, "float32", "bfloat16" or "float16"; None: as they are saved. Images and outputs are
            float32 in all.
        batch, tokens: a fixed size instead of any.
        img_size: height and width of images, for models that take any.
        opset: of ONNX, 18 to 25; None: 20.
        tolerance: largest difference to the model in PyTorch, as a share of the largest output; None: 1e-4 for float32,
            2e-2 for float16, 1e-1 for bfloat16.
        cache: of a language model that writes: keys and values of earlier tokens come in and go out, as
            past_key_values.LAYER.key and present.LAYER.key and so on, and each call computes the new tokens alone.
        kernels: for torch: call formix's CPU kernels, so that a process needs `import formix` before it loads the file.

    Returns:
        What the JSON file says; `check` has the measured difference.

    Raises:
        ValueError: what cannot be exported, a PyTorch that is too old for it, a package that is missing, or a file
            that differs from the model by more than the tolerance; nothing is written then.
    """
    if is_torch_version("<", needed := "2.10" if cache else "2.8"):
        raise ValueError(
            f"An export{' with a cache' if cache else ''} needs PyTorch {needed} or later, and this is "
            f"{torch.__version__}; update it."
        )
    out = Path(out)
    format, path = _place(out, format)
    kind = formats.find(format)
    _check_options(format, batch, tokens, img_size, opset, tolerance, dtype, kernels)
    found = read_source(source, img_size=img_size)
    companions = _companions(found, path)
    original = found.model if isinstance(source, str | Path) else copy.deepcopy(found.model)
    original = original.cpu().eval().requires_grad_(False)
    types = sorted({str(p.dtype).removeprefix("torch.") for p in original.parameters()})
    if len(types) > 1:
        raise ValueError(f"The weights are {' and '.join(types)}; save the model in one type: model.to(torch.float32).")
    (own,) = types
    chosen = dtype or own
    if chosen not in DTYPES:
        raise ValueError(f"The weights are {own}, which no format has; give --dtype, one of {', '.join(DTYPES)}.")
    if chosen == "bfloat16" and format == "onnx":
        raise ValueError(
            "ONNX Runtime has no bfloat16 on the CPU, so that the file could not be run and checked here; give "
            "--dtype=float16 or float32."
        )
    model = original if chosen == own else copy.deepcopy(original).to(DTYPES[chosen])
    program = _program(found, model, batch, tokens, cache)
    reference = program if model is original else _program(found, original, batch, tokens, cache)
    with contextlib.nullcontext() if kernels else portable():
        sizes = program.sizes(verify.TRACED)
        exported = trace(program, sizes)
        outputs = output_ports(program, exported, sizes)
    if not kernels and (foreign := sorted({str(n.target) for n in exported.graph.nodes if _is_own(n.target)})):
        raise AssertionError(f"the reference form still calls {', '.join(foreign)}")

    sheet = Sheet(
        file=path.name,
        files={},
        format=format,
        dtype=chosen,
        kernels=kernels,
        model=type(original).__name__,
        task=program.task,
        **_design(original),
        inputs=program.inputs,
        outputs=tuple(outputs),
        axes=program.axes,
        image=found.image,
        text=_text(found, program),
        labels=found.labels,
        notes=(*found.notes, *_notes(found, program, format, unread(program, exported), kernels)),
        versions={name: version for name in PACKAGES if (version := version_of(name)) is not None},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".partial-{path.name}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        opset = kind.write(exported, partial / path.name, program, outputs, _properties(sheet), opset=opset)
        call = kind.run(partial / path.name, program.inputs, outputs)
        limit = verify.TOLERANCES[chosen] if tolerance is None else tolerance
        check = verify.check(program, reference, call, runtime=kind.runtime(), tolerance=limit)
        del call  # it may hold the files open
        if check.largest == 0:
            note = "every output is 0 (a classifier that was never trained?), so that the check says nothing"
            _log.warning("%s", note)
            sheet = dataclasses.replace(sheet, notes=(*sheet.notes, note))
        files = {p.name: p.stat().st_size for p in sorted(partial.iterdir(), key=lambda p: p.name == path.name)}
        sheet = dataclasses.replace(sheet, files=files, opset=opset, check=check)
        for name in files:  # the model itself last: what it refers to is there by then
            os.replace(partial / name, path.parent / name)
        if (weights := f"{path.name}.data") not in files:  # of a larger model that was here before
            (path.parent / weights).unlink(missing_ok=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for companion in companions:
        shutil.copyfile(companion, path.parent / companion.name)
    write(sheet, path.with_name(f"{path.name}.json"))
    return sheet


def _place(out: Path, format: str | None) -> tuple[str, Path]:
    """The format and the file, of a file or a directory."""
    by_suffix = {suffix: name for name, suffix in formats.FORMATS.items()}
    named = by_suffix.get(out.suffix)
    if format is None and named is None:
        raise ValueError(
            f"out is {out}, whose name is of no format; give a file ({', '.join(by_suffix)}), or a directory and a "
            f"format, one of {', '.join(formats.FORMATS)}."
        )
    if format is not None and format not in formats.FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(map(repr, formats.FORMATS))}.")
    if named is not None and format not in (None, named):
        raise ValueError(f"out is {out}, which is a file of {named}, and format is {format!r}; let them agree.")
    format = format or named
    assert format is not None
    if named is not None:
        if out.is_dir():
            raise ValueError(f"{out} is a directory; give another name for the file.")
        return format, out
    if out.is_file() or (out.suffix and not out.is_dir()):
        raise ValueError(
            f"out is {out}; give a directory, or a file whose name ends in {formats.FORMATS[format]} for {format}."
        )
    return format, out / f"model{formats.FORMATS[format]}"


def _check_options(
    format: str,
    batch: int | None,
    tokens: int | None,
    img_size: int | None,
    opset: int | None,
    tolerance: float | None,
    dtype: str | None,
    kernels: bool,
) -> None:
    for name, value in (("batch", batch), ("tokens", tokens), ("img_size", img_size)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be a whole number, 1 or more, or left out.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(map(repr, DTYPES))}.")
    if tolerance is not None and not (isinstance(tolerance, int | float) and 0 <= tolerance < float("inf")):
        raise ValueError(f"tolerance is {tolerance!r}; it must be 0 or more.")
    if opset is not None and format != "onnx":
        raise ValueError(f"opset is {opset}, and {format} has none; leave it out.")
    if opset is not None:
        formats.find("onnx").check_opset(opset)
    if kernels and format != "torch":
        raise ValueError(f"kernels are formix's own operators, which {format} does not have; use format 'torch'.")
    native = native_module()
    if kernels and (native is None or not native.available()[0]):
        raise ValueError(
            "kernels=True, but this installation has none that run here; `formix implementations` says why."
        )


def _program(found: Source, model: Any, batch: int | None, tokens: int | None, cache: bool) -> Program:
    if cache and not (found.size is None and model.can_generate()):
        raise ValueError(
            f"cache is for language models that write, and this is a {type(model).__name__}; leave it out."
        )
    if found.size is not None:
        if tokens is not None:
            raise ValueError(f"tokens is {tokens}, but this {type(model).__name__} takes images; leave it out.")
        return ImageProgram(model, found.size, batch=batch).eval()
    from formix.models.text import check_length, is_decoder

    config = model.config
    check_length(model, tokens or 0)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ValueError(
            f"The rotary positions of this model (rope_type {rope!r}) depend on the longest text of a call, which no "
            "file can hold; types with the same angles in every call can be exported, such as 'yarn' and 'llama3'."
        )
    if found.task == "sequence-classification" and is_decoder(model) and config.pad_token_id is None and batch != 1:
        raise ValueError(
            "This decoder reads the class at the last token that is no padding, and its config names no pad_token_id: "
            "set model.config.pad_token_id and save it again, or export with --batch=1."
        )
    kind = CachedProgram if cache else TextProgram
    return kind(model, found.task, batch=batch, tokens=tokens).eval()


def _companions(found: Source, path: Path) -> list[Path]:
    """The files to copy, refused where another of the same name is in the way."""
    wanted = []
    for companion in found.companions:
        there = path.parent / companion.name
        if there.is_file():
            if there.read_bytes() != companion.read_bytes():
                raise ValueError(f"{there} is in the way of {companion}; choose an empty directory with --out.")
        else:
            wanted.append(companion)
    return wanted


def _design(model: Any) -> dict[str, Any]:
    stored = getattr(model.config, "design", None) if hasattr(model, "config") else model.design
    if stored is None:
        return {}
    design: Design = find_design(stored)
    return {"design": design.to_dict(), "formula": design.describe()}


def _text(found: Source, program: Program) -> dict[str, Any] | None:
    if not isinstance(program, TextProgram):
        return None
    config = program.model.config
    files = [p.name for p in found.companions if p.name not in ("preprocessor_config.json", "generation_config.json")]
    text = {"vocab_size": config.vocab_size, "pad_token_id": config.pad_token_id, "tokenizer_files": files}
    if found.task == "sequence-classification":
        single = "regression" if config.num_labels == 1 else "single_label_classification"
        text["problem_type"] = config.problem_type or single
    return text


def _notes(found: Source, program: Program, format: str, unread: list[str], kernels: bool) -> list[str]:
    notes = []
    if isinstance(program, TextProgram) and not any(p.name.startswith(TOKENIZER) for p in found.companions):
        notes.append("no tokenizer lies beside the model: input_ids have to be made as in its training")
    if isinstance(program, TextProgram) and program.task == "features" and not program.decoder:
        notes.append("formix's embedding: the mean of last_hidden_state where attention_mask is 1, of unit length")
    if isinstance(program, TextProgram) and program.decoder:
        if isinstance(program, CachedProgram):
            notes.append("present.* of a call are past_key_values.* of the next; the first has a past of 0 tokens")
            if program.room is not None:
                notes.append(f"past and tokens together are at most {program.room}")
        else:
            notes.append("no cache: every call computes all its tokens")
        notes.append("positions count the ones of attention_mask, so padding may stand on either side")
        if program.task == "sequence-classification":
            notes.append("the class is read at the last token of input_ids that is not pad_token_id")
    notes += [f"{name} changes nothing in this model" for name in unread]
    if format == "openvino":
        notes.append("OpenVINO computes in bfloat16 where it can; EXECUTION_MODE_HINT=ACCURACY keeps the checked type")
    if kernels:
        notes.append("`import formix` before torch.export.load: the program calls formix's CPU kernels")
    return notes


def _properties(sheet: Sheet) -> dict[str, str]:
    """What the file itself carries, as JSON by name: all that is known before it is run."""
    told = ("model", "task", "design", "formula", "inputs", "outputs", "axes", "image", "text", "labels", "notes")
    values = plain(sheet)
    properties = {f"formix.{name}": json.dumps(values[name], ensure_ascii=False) for name in told if values[name]}
    return {**properties, "formix.version": sheet.versions["formix"]}


def _is_own(target: Any) -> bool:
    return getattr(target, "namespace", None) == "formix"
