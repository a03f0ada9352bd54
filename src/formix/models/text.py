"""Text models by name: which classes serve which task, and the sizes people ask for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.activations import ACT2FN

from formix.design import Design
from formix.design import design as find_design
from formix.models import bert, distilbert, gpt2, llama, roberta
from formix.models.loading import check_loaded, known_fields, read_weights, refusals_named

_COUNTS = {  # fields of the configs that count something
    "n_embd", "n_layer", "n_head", "n_positions", "dim", "n_layers", "n_heads", "hidden_dim",
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_labels",
    "intermediate_size", "max_position_embeddings", "type_vocab_size",
}  # fmt: skip
_WITHOUT_CLASSES = ("causal-lm", "masked-lm", "features")  # tasks for which num_labels says nothing
# family -> (config class, {task: model class}); the first task is the default
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (
        gpt2.FormixGPT2Config,
        {
            "causal-lm": gpt2.FormixGPT2LMHeadModel,
            "sequence-classification": gpt2.FormixGPT2ForSequenceClassification,
            "token-classification": gpt2.FormixGPT2ForTokenClassification,
            "question-answering": gpt2.FormixGPT2ForQuestionAnswering,
            "features": gpt2.FormixGPT2Model,
        },
    ),
    "bert": (
        bert.FormixBertConfig,
        {
            "masked-lm": bert.FormixBertForMaskedLM,
            "sequence-classification": bert.FormixBertForSequenceClassification,
            "token-classification": bert.FormixBertForTokenClassification,
            "question-answering": bert.FormixBertForQuestionAnswering,
            "multiple-choice": bert.FormixBertForMultipleChoice,
            "features": bert.FormixBertModel,
        },
    ),
    "roberta": (
        roberta.FormixRobertaConfig,
        {
            "masked-lm": roberta.FormixRobertaForMaskedLM,
            "sequence-classification": roberta.FormixRobertaForSequenceClassification,
            "token-classification": roberta.FormixRobertaForTokenClassification,
            "question-answering": roberta.FormixRobertaForQuestionAnswering,
            "multiple-choice": roberta.FormixRobertaForMultipleChoice,
            "features": roberta.FormixRobertaModel,
        },
    ),
    "distilbert": (
        distilbert.FormixDistilBertConfig,
        {
            "masked-lm": distilbert.FormixDistilBertForMaskedLM,
            "sequence-classification": distilbert.FormixDistilBertForSequenceClassification,
            "token-classification": distilbert.FormixDistilBertForTokenClassification,
            "question-answering": distilbert.FormixDistilBertForQuestionAnswering,
            "multiple-choice": distilbert.FormixDistilBertForMultipleChoice,
            "features": distilbert.FormixDistilBertModel,
        },
    ),
    "llama": (
        llama.FormixLlamaConfig,
        {
            "causal-lm": llama.FormixLlamaForCausalLM,
            "sequence-classification": llama.FormixLlamaForSequenceClassification,
            "token-classification": llama.FormixLlamaForTokenClassification,
            "question-answering": llama.FormixLlamaForQuestionAnswering,
            "features": llama.FormixLlamaModel,
        },
    ),
}


DECODERS = ("gpt2", "llama")  # families whose tokens see earlier ones alone


def _gpt2(layers: int, width: int, heads: int) -> dict[str, int]:
    return {"n_layer": layers, "n_embd": width, "n_head": heads}


def _bert(layers: int, width: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }


def _roberta(layers: int, width: int) -> dict[str, Any]:
    return {**_bert(layers, width), "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}


def _llama(layers: int, width: int, heads: int, kv_heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "rms_norm_eps": 1e-5,
        **more,
    }


# name -> (family, config fields); the published sizes, and small ones to try things on
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-nano": ("gpt2", _gpt2(4, 128, 4)),
    "gpt2-mini": ("gpt2", _gpt2(6, 384, 6)),
    "gpt2": ("gpt2", _gpt2(12, 768, 12)),
    "gpt2-medium": ("gpt2", _gpt2(24, 1024, 16)),
    "gpt2-large": ("gpt2", _gpt2(36, 1280, 20)),
    "gpt2-xl": ("gpt2", _gpt2(48, 1600, 25)),
    "bert-tiny": ("bert", _bert(2, 128)),
    "bert-mini": ("bert", _bert(4, 256)),
    "bert-small": ("bert", _bert(4, 512)),
    "bert-medium": ("bert", _bert(8, 512)),
    "bert-base-uncased": ("bert", _bert(12, 768)),
    "bert-large-uncased": ("bert", _bert(24, 1024)),
    "roberta-tiny": ("roberta", _roberta(2, 128)),
    "roberta-mini": ("roberta", _roberta(4, 256)),
    "roberta-base": ("roberta", _roberta(12, 768)),
    "roberta-large": ("roberta", _roberta(24, 1024)),
    "distilbert-base": ("distilbert", _bert(6, 768)),
    "llama-nano": ("llama", _llama(4, 128, 4, 2, 384)),
    "llama-mini": ("llama", _llama(6, 384, 6, 2, 1024)),
    "llama-1.1b": ("llama", _llama(22, 2048, 32, 4, 5632)),  # TinyLlama's
    "llama-2-7b": ("llama", _llama(32, 4096, 32, 32, 11008, max_position_embeddings=4096)),
}


def create_text_model(
    name: str, design: str | Design = "softmax", *, task: str | None = None, **config: Any
) -> PreTrainedModel:
    """A text model with random weights; `config` holds fields of the family's transformers config.

    Raises:
        ValueError: unknown task or config field, or a design that the family cannot have (SimA in a decoder).
    """
    family, size = SIZES[name]
    config_class, classes = FAMILIES[family]
    canonical = known_fields(config_class, size | config)
    _check_fields(canonical)
    task = task or ("sequence-classification" if "num_labels" in canonical else next(iter(classes)))
    model_class = _class_for(family, task)
    vocabulary = canonical.get("vocab_size", config_class().vocab_size)
    for token in ("bos_token_id", "eos_token_id"):  # GPT-2's own lie outside a smaller vocabulary
        if (getattr(config_class(), token, None) or 0) >= vocabulary:
            canonical.setdefault(token, None)
    chosen = find_design(design).to_dict()
    with refusals_named(name, config):
        model = model_class(config_class(**canonical, design=chosen))
    return model if model.config.dtype is None else model.to(model.config.dtype)


def _check_fields(config: dict[str, Any]) -> None:
    """Raise `ValueError` for sizes that no model has and activations that transformers does not know."""
    for name in _COUNTS & config.keys():
        value = config[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number, 1 or more.")
    for name in {"hidden_act", "activation_function", "activation"} & config.keys():
        if config[name] not in ACT2FN:
            raise ValueError(f"{name} is {config[name]!r}; it must be one of {', '.join(sorted(ACT2FN))}.")


def from_directory(
    directory: Path, design: str | Design | None = None, *, task: str | None = None, **config: Any
) -> PreTrainedModel:
    """A transformers directory (BERT, RoBERTa, GPT-2 or Llama, or one that formix saved) with its weights, in `design`.

    With `design`, every weight that has a place is carried over and the others are announced in the log. Nothing in
    a stock directory says which wiring its weights were trained with, so a PAF checkpoint in RoBERTa's layout needs
    ``design("paf", official=True)`` here.

    Raises:
        ValueError: a family that formix does not know, a design or, without `task`, a head with weights that the
            directory does not have, or a design other than the wiring that a pruned directory was pruned for.
    """
    stored = json.loads((directory / "config.json").read_text())
    family = str(stored.get("model_type", "")).removeprefix("formix_")
    if family not in FAMILIES or stored["model_type"] == "distilbert":  # which has other names than formix's DistilBERT
        raise ValueError(
            f"{directory} has model_type {stored.get('model_type')!r}, and its weights have no place here as they are "
            f"(those of bert, roberta, gpt2, llama and cvt have): formix convert {directory} --design=NAME --out=DIR "
            "reads DistilBERT, XLM-RoBERTa, ViT, DINO, Qwen and Mistral too."
        )
    config_class, classes = FAMILIES[family]
    given = known_fields(config_class, config)
    _check_fields(given)
    own_task = task is None and not given
    if task is None:
        heads = [name.removeprefix("Formix") for name in stored.get("architectures") or []]
        task = next((t for t, c in classes.items() if c.__name__.removeprefix("Formix") in heads), next(iter(classes)))
        if "num_labels" in given and task in _WITHOUT_CLASSES:
            task = "sequence-classification"
    source = AutoConfig.from_pretrained(directory, local_files_only=True)
    chosen = find_design(design if design is not None else stored.get("design") or "softmax")
    if stored.get("pruned_kv") and chosen != find_design(stored["design"]):
        raise ValueError(
            f"{directory} was pruned for its own skip wiring and lacks projections that another design reads; "
            "start from the directory that was pruned."
        )
    fields = {k: v for k, v in source.to_dict().items() if k not in ("model_type", "design")}
    with refusals_named(str(directory), config):
        new_config = config_class(**(fields | given), design=chosen.to_dict())
    model, report = read_weights(
        _class_for(family, task),
        directory,
        config=new_config,
        key_mapping=_RENAMED.get(family),
        ignore_mismatched_sizes=not own_task,  # the head of another number of labels; anything else is refused below
    )
    as_saved = own_task and design is None and str(stored["model_type"]).startswith("formix_")
    missing = report["missing_keys"]
    if as_saved and missing and all(k.startswith("pooler.") for k in missing):
        model.pooler, report["missing_keys"] = None, set()  # it was saved without: BertModel(add_pooling_layer=False)
    check_loaded(model, report, directory, layers=_LAYERS[family], whole=as_saved, new_head=not own_task)
    if not as_saved:
        model.conversion_record = None  # it is about the directory's own design
    return model


# the name of a family's list of layers
_LAYERS = {"gpt2": "h", "bert": "layer", "roberta": "layer", "distilbert": "layer", "llama": "layers"}
_RENAMED = {"llama": {r"^transformer\.": "model."}}  # transformers' question answering calls its trunk otherwise


def task_of(model: Any) -> str:
    """What a model of formix's is for, in the words of `FAMILIES`, or "image-classification"; a regression is a
    classification."""
    if not hasattr(model, "config") or model.config.model_type == "formix_cvt":
        return "image-classification"
    return next(task for _, kinds in FAMILIES.values() for task, kind in kinds.items() if type(model) is kind)


def is_decoder(model: Any) -> bool:
    """Whether a model of formix's, of text, is of a family whose tokens see earlier ones alone."""
    return str(model.config.model_type).removeprefix("formix_") in DECODERS


def positions(config: Any) -> int | None:
    """How many tokens a model, formix's or transformers', has positions for; None: any number, by rotation, or none.
    RoBERTa's follow the padding's."""
    if getattr(config, "rope_parameters", None) is not None or not hasattr(config, "max_position_embeddings"):
        return None
    before = config.pad_token_id + 1 if config.model_type.endswith("roberta") else 0
    return config.max_position_embeddings - before


def check_length(model: Any, sequence_length: int) -> None:
    """Raise `ValueError` for text in pieces of more tokens than a model has positions for."""
    room = positions(model.config) if hasattr(model, "config") else None
    if room is not None and sequence_length > room:
        raise ValueError(
            f"sequence_length is {sequence_length}; this {type(model).__name__} has {room} positions: give {room} or "
            "less."
        )


def as_choices(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors [B, N] as the model's class takes them: for multiple choice [B, 1, N], a single choice each."""
    multiple = "MultipleChoice" in type(model).__name__
    return {k: v[:, None] for k, v in batch.items()} if multiple else dict(batch)


def _class_for(family: str, task: str) -> Any:
    classes = FAMILIES[family][1]
    if task not in classes:
        raise ValueError(f"task is {task!r}; {family} models do {', '.join(classes)}.")
    return classes[task]


def _register() -> None:
    """Make transformers' Auto classes know formix's model types; runs when this module has been imported.

    `Trainer` looks for a class's name among those of language models to shift the labels that it smooths.
    """
    import transformers as hf
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    autos = {
        "causal-lm": hf.AutoModelForCausalLM,
        "masked-lm": hf.AutoModelForMaskedLM,
        "sequence-classification": hf.AutoModelForSequenceClassification,
        "token-classification": hf.AutoModelForTokenClassification,
        "question-answering": hf.AutoModelForQuestionAnswering,
        "multiple-choice": hf.AutoModelForMultipleChoice,
        "features": hf.AutoModel,
    }
    for config_class, classes in FAMILIES.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for task, model_class in classes.items():
            autos[task].register(config_class, model_class, exist_ok=True)
        if "causal-lm" in classes:
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = classes["causal-lm"].__name__


_register()
