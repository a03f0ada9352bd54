"""Llama-family decoders with blocks of any causal design; parameter names of transformers' Llama.

Three options make the same blocks those of Qwen2 (`qkv_bias`), Qwen3 (`qk_rms_norm`) and Mistral (`sliding_window`,
`layer_types`); `formix.convert` sets them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from formix.design import GatedUnit, LayerDesign
from formix.layers import GatedUnit as GatedUnitLayer
from formix.layers.attention import KeyValue
from formix.layers.layout import norms_kept
from formix.models.cache import CACHE, cache_of, count_tokens, next_positions
from formix.models.hf import (
    DesignedAttention,
    DesignedBlock,
    WithHead,
    as_boolean,
    check_inputs,
    check_mask,
    layer_designs,
    linear_rows,
    no_layers,
    run_layers,
)
from formix.models.recorded import Recorded

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [B, N, D]


class FormixLlamaConfig(LlamaConfig):
    """Llama's config and the design of its blocks."""

    model_type = "formix_llama"
    design: dict | None = None
    qkv_bias: bool | None = None  # a bias in the query, key and value projections alone; None: as attention_bias
    qk_rms_norm: bool = False  # RMSNorm of every query and key over the head's width, before the rotation
    sliding_window: int | None = None  # how many keys, the query's own included, the layers below see
    layer_types: list[str] | None = None  # of every layer: "full_attention" or "sliding_attention"; None: all full
    pruned_kv: bool = False  # see formix.models.kv_heads.prune_kv_heads

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:  # transformers' caches and masks want it spelt out
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)


class RMSNorm(LlamaRMSNorm):
    """w x / sqrt(mean(x^2) + eps), in float32 for 16-bit inputs as transformers has it, and in float64 for float64."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class FormixLlamaRotaryEmbedding(LlamaRotaryEmbedding):
    """transformers' rotation, whose frequencies no cast rounds to 16 bits: no file holds them, so that a loaded model
    has them whole."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if (cast := getattr(self, name)).dtype.itemsize < 4:
                setattr(self, name, buffer.to(cast.device))
        return self


class FormixLlamaAttention(DesignedAttention):
    """Causal attention of any mixer with Llama's grouped-query projections and rotary positions.

    Query head i reads key/value head i // (H / Hkv). Keys are cached and handed to later layers after the rotation,
    so under skip wiring a position keeps the rotation of its own place whichever layer reads it.
    """

    def __init__(self, config: FormixLlamaConfig, layer: LayerDesign) -> None:
        dim, heads, kv_heads = config.hidden_size, config.num_attention_heads, int(config.num_key_value_heads or 0)
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"num_key_value_heads is {kv_heads}; it must divide num_attention_heads, {heads}.")
        head_dim, bias = config.head_dim or dim // heads, config.attention_bias
        if head_dim % 2:
            raise ValueError(f"A head has {head_dim} channels; rotary positions turn pairs: give an even number.")
        super().__init__(
            layer,
            config,
            num_heads=heads,
            head_dim=head_dim,
            num_kv_heads=kv_heads,
            dropout=config.attention_dropout or 0.0,
            causal=True,
        )
        own = len(self.kv_heads.own) * head_dim
        qkv_bias = bias if config.qkv_bias is None else config.qkv_bias
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, own, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, own, bias=qkv_bias)
        if config.qk_rms_norm:
            if self.has_qk_norm:
                raise ValueError("This model normalises queries and keys itself (qk_rms_norm): leave out qk_norm.")
            self.q_norm: Any = RMSNorm(head_dim, eps=config.rms_norm_eps)
            self.k_norm: Any = RMSNorm(head_dim, eps=config.rms_norm_eps)
            self.has_qk_norm = True
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any,
        source_kv: KeyValue | None,
        rotation: Rotation,
    ) -> tuple[Tensor, KeyValue]:
        """[B, N, C] -> [B, N, C] and this layer's own rotated keys and values, those in the cache included."""
        q, k, v = (self.split_heads(linear(x)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(*self.normed(q, k), *rotation)  # [B, H, N, D] and [B, own heads, N, D]
        out, own = self.mix(x, q, k, v, attention_mask, source_kv, past_key_values)
        return self.o_proj(out), own

    def keep_kv_channels(self, channels: Tensor) -> None:
        self.k_proj, self.v_proj = linear_rows(self.k_proj, channels), linear_rows(self.v_proj, channels)


class FormixLlamaDecoderLayer(DesignedBlock):
    """Llama's layer in the order that the design's layout says; `parallel` is PaLM's form with one norm."""

    def __init__(self, config: FormixLlamaConfig, layer: LayerDesign) -> None:
        super().__init__(layer, "pre")
        dim, eps = config.hidden_size, config.rms_norm_eps
        first, second = norms_kept(layer, "pre")
        gated = isinstance(layer.mixer, GatedUnit)
        self.layer_idx = layer.index
        self.windowed = bool(config.layer_types) and config.layer_types[layer.index] == "sliding_attention"  # type: ignore[index]
        self.self_attn: Any = GatedUnitLayer.of(layer, dim) if gated else FormixLlamaAttention(config, layer)
        self.mlp: Any = LlamaMLP(config) if layer.layout.ffn else None
        self.input_layernorm = RMSNorm(dim, eps=eps) if first else nn.Identity()
        self.post_attention_layernorm = RMSNorm(dim, eps=eps) if second else nn.Identity()

    def mix(
        self, x: Tensor, attention_mask: Any, source_kv: KeyValue | None, past: Any, positions: Any
    ) -> tuple[Tensor, KeyValue | None]:
        if isinstance(self.self_attn, FormixLlamaAttention):
            full, window = attention_mask
            return self.self_attn(x, window if self.windowed else full, past, source_kv, positions)
        count_tokens(x, past, self.layer_idx)
        return self.self_attn(x), None

    def feed(self, x: Tensor) -> Tensor:
        return self.mlp(x)

    def norms(self) -> tuple[Any, Any]:
        return self.input_layernorm, self.post_attention_layernorm


class FormixLlamaPreTrainedModel(Recorded, LlamaPreTrainedModel):
    """Initialisation as Llama's; attention weights are never materialised, so `attentions` cannot be returned."""

    config_class = FormixLlamaConfig
    config: FormixLlamaConfig
    _no_split_modules = ["FormixLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": FormixLlamaDecoderLayer}
    _supports_flash_attn = False
    _supports_flex_attn = False


class FormixLlamaModel(FormixLlamaPreTrainedModel, LlamaModel):
    """Llama's trunk with a design's blocks."""

    def __init__(self, config: FormixLlamaConfig) -> None:
        with no_layers(config):
            super().__init__(config)
        kinds = config.layer_types or []
        if len(kinds) != config.num_hidden_layers:
            raise ValueError(f"layer_types names {len(kinds)} layers, the model has {config.num_hidden_layers}.")
        if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
            raise ValueError(f"layer_types has {unknown[0]!r}; it must be 'full_attention' or 'sliding_attention'.")
        if "sliding_attention" in kinds and not config.sliding_window:
            raise ValueError("layer_types has sliding layers, and sliding_window is None; give it a number of keys.")
        self.windows = [kind == "sliding_attention" for kind in kinds]
        self.norm: Any = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb: Any = FormixLlamaRotaryEmbedding(config)
        self.layer_designs = layer_designs(config, causal=True)
        for layer in self.layer_designs:
            if layer.source is not None and self.windows[layer.index] != self.windows[layer.source]:
                raise ValueError(
                    f"Layer {layer.index} reads the keys of layer {layer.source}, and only one of the two has a "
                    "sliding window: join layers of one type."
                )
        self.layers = nn.ModuleList(FormixLlamaDecoderLayer(config, layer) for layer in self.layer_designs)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As transformers' `LlamaModel.forward`, whose `past_key_values` is `cache` since 5.24. Masks are tokenizer
        masks [batch, past + tokens] or boolean 4-D.
        """
        check_inputs(self.config, input_ids, inputs_embeds, kwargs)
        check_mask(attention_mask)
        past_key_values, use_cache = cache_of(self, past_key_values, cache, use_cache)
        x: Any = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, N, C]
        if position_ids is None:
            position_ids = next_positions(x, past_key_values)
        masking = {
            "config": self.config,
            "inputs_embeds": x,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: past_key_values,
        }
        # generate() prepares the masks of static caches itself, one for each type of layer
        masks: dict[str, Any] = attention_mask if isinstance(attention_mask, dict) else {}
        make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        full, window = (
            as_boolean(masks[kind] if kind in masks else make[kind](**masking))
            if kind in (self.config.layer_types or [])
            else None
            for kind in make
        )
        rotation = self.rotary_emb(x, position_ids=position_ids)
        depth = self.config.num_hidden_layers  # fewer while generate(assistant_early_exit=...) drafts
        x = run_layers(
            self.layers[:depth],
            self.layer_designs[:depth],
            x,
            (full, window),
            rotation,
            past_key_values=past_key_values,
        )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), **{CACHE: past_key_values if use_cache else None}
        )


class FormixLlamaForCausalLM(WithHead, FormixLlamaPreTrainedModel, LlamaForCausalLM):
    """Language model; the output projection is tied to the token embedding if the config says so."""

    trunk_class = FormixLlamaModel


# transformers' generic heads ask AutoModel for the trunk of the config, which is formix's
class FormixLlamaForSequenceClassification(GenericForSequenceClassification, FormixLlamaPreTrainedModel):
    """Classification or regression of the last token."""


class FormixLlamaForTokenClassification(GenericForTokenClassification, FormixLlamaPreTrainedModel):
    """Classification of every token."""


class FormixLlamaForQuestionAnswering(GenericForQuestionAnswering, FormixLlamaPreTrainedModel):
    """Start and end of the answer in a text."""
