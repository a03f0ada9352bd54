"""Where a model's layers have what: one table for formix's blocks and for those of timm and transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from formix.design import LayerDesign


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Paths of submodules in the layers of a family; of `mixer` and `out` the first that a layer has."""

    mixer: tuple[str, ...]
    out: tuple[str, ...] = ()
    scaled: str | None = None  # None: the family has no layer scale
    norms: tuple[str, str]
    ffn: tuple[str, ...] = ("mlp",)
    ffn_in: tuple[str, ...] = ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x")
    post: bool = False


_VIT = _Places(mixer=("attn",), out=("attn.proj",), scaled="ls1", norms=("norm1", "norm2"))
_DROPPED = replace(_VIT, scaled="drop_path1")  # layer scale is a parameter, or a norm stands in its place
_XCIT = replace(_DROPPED, ffn=("local_mp", "mlp"))
_BERT = _Places(
    mixer=("attention.unit", "attention.self"),
    out=("attention.output.dense",),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    ffn=("intermediate", "output"),
    ffn_in=("intermediate.dense",),
    post=True,
)
_DISTILBERT = _Places(
    mixer=("attention",),
    out=("attention.out_lin",),
    norms=("sa_layer_norm", "output_layer_norm"),
    ffn=("ffn",),
    ffn_in=("ffn.lin1",),
    post=True,
)
_GPT2 = _Places(mixer=("attn",), out=("attn.c_proj",), norms=("ln_1", "ln_2"), ffn_in=("mlp.c_fc",))
_LLAMA = _Places(
    mixer=("self_attn",),
    out=("self_attn.o_proj",),
    norms=("input_layernorm", "post_attention_layernorm"),
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
)
_CVT = _Places(
    mixer=("attention.attention",),
    out=("attention.output.dense",),
    norms=("layernorm_before", "layernorm_after"),
    ffn=("intermediate", "output"),
    ffn_in=("intermediate.dense",),
)
_ACTIVATOR = _Places(
    mixer=("actgu", "mgu"), out=("actgu.proj_3",), norms=("norm", "norm"), ffn=("ffn",), ffn_in=("ffn.net.0",)
)

# a class of layers, or one that it extends
_FAMILIES = {
    "formix.layers.block.Block": _VIT,
    "timm.models.vision_transformer.Block": _VIT,
    "timm.models.vision_transformer_relpos.RelPosBlock": _VIT,
    "timm.models.vision_transformer.ResPostBlock": _DROPPED,
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock": _DROPPED,
    "timm.models.eva.EvaBlock": _DROPPED,
    "timm.models.eva.EvaBlockPostNorm": _DROPPED,
    "timm.models.xcit.XCABlock": _XCIT,
    "formix.models.bert.FormixBertLayer": _BERT,
    "transformers.models.bert.modeling_bert.BertLayer": _BERT,
    "transformers.models.roberta.modeling_roberta.RobertaLayer": _BERT,
    "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer": _BERT,
    "transformers.models.camembert.modeling_camembert.CamembertLayer": _BERT,
    "transformers.models.distilbert.modeling_distilbert.TransformerBlock": _DISTILBERT,
    "formix.models.gpt2.FormixGPT2Block": _GPT2,
    "transformers.models.gpt2.modeling_gpt2.GPT2Block": _GPT2,
    "formix.models.llama.FormixLlamaDecoderLayer": _LLAMA,
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer": _LLAMA,
    "transformers.models.mistral.modeling_mistral.MistralDecoderLayer": _LLAMA,
    "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer": _LLAMA,
    "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer": _LLAMA,
    "transformers.models.cvt.modeling_cvt.CvtLayer": _CVT,
    "formix.models.activator.ActivatorBlock": _ACTIVATOR,
}


@dataclass(frozen=True)
class Layer:
    """One layer of a model and its parts; those that it does not have are None."""

    name: str  # in the model
    block: Any
    mixer: Any  # the attention, or the unit in its place
    out: Any  # the projection behind the mixer, a linear layer [H D -> C]
    scaled: Any  # its output is what the mixer adds to the residual stream, behind layer scale
    norms: tuple[Any, Any]
    norm_names: tuple[str, str]  # in the model, whether the layer has them or not
    ffn: tuple[Any, ...]
    ffn_in: tuple[Any, ...]  # the linear layers that read the FFN's input
    post: bool  # the family has its norms behind the residual sums

    @property
    def branch(self) -> Any:
        """The module whose output is the mixer's branch, before layer scale, residual and norm."""
        return self.mixer if self.out is None else self.out

    @property
    def design(self) -> LayerDesign | None:
        """The layer's part of the model's design; None: another library's layer."""
        return getattr(self.block, "layer_design", None)

    @property
    def heads(self) -> int:
        return getattr(self.mixer, "num_heads", 0)


def layers(model: nn.Module) -> list[Layer]:
    """The layers of a model in order.

    Raises:
        ValueError: a model that has none of the layers known here.
    """
    found = find_layers(model)
    if not found:
        raise ValueError(
            f"A {type(model).__name__} has no layers that formix can look into; it knows those of its own models, of "
            "timm's VisionTransformer, Eva and Xcit (but blocks of several branches at once), and of transformers' "
            "BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, GPT-2, Llama, Mistral, Qwen2, Qwen3 and CvT."
        )
    return found


def find_layers(model: nn.Module) -> list[Layer]:
    """As `layers`, and an empty list for a model that has none."""
    places = ((name, module, _places(module)) for name, module in model.named_modules())
    return [_layer(name, module, where) for name, module, where in places if where is not None]


def _places(block: nn.Module) -> _Places | None:
    kinds = (f"{c.__module__}.{c.__qualname__}" for c in type(block).__mro__)
    return next((_FAMILIES[kind] for kind in kinds if kind in _FAMILIES), None)


def _layer(name: str, block: nn.Module, places: _Places) -> Layer:
    def found(*paths: str) -> tuple[nn.Module, ...]:
        return tuple(part for path in paths if (part := _part(block, path)) is not None)

    mixer, out = next(iter(found(*places.mixer))), next(iter(found(*places.out)), None)
    branch = mixer if out is None else out
    return Layer(
        name=name,
        block=block,
        mixer=mixer,
        out=out,
        scaled=branch if places.scaled is None else _part(block, places.scaled),
        norms=(_part(block, places.norms[0]), _part(block, places.norms[1])),
        norm_names=(f"{name}.{places.norms[0]}", f"{name}.{places.norms[1]}"),
        ffn=found(*places.ffn),
        ffn_in=found(*places.ffn_in),
        post=places.post,
    )


def _part(module: nn.Module, path: str) -> nn.Module | None:
    part: Any = module
    for name in path.split("."):
        part = getattr(part, name, None)
    return part if isinstance(part, nn.Module) else None


def weight_in_out(linear: Any) -> Tensor:
    """The weight of a linear layer as [in, out], a view."""
    return linear.weight.data if isinstance(linear, Conv1D) else linear.weight.data.T
