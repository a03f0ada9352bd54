"""GPT-2 with blocks of any causal design; parameter names of transformers' GPT-2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2PreTrainedModel
from transformers.pytorch_utils import Conv1D
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
    no_layers,
    run_layers,
)
from formix.models.recorded import Recorded


class FormixGPT2Config(GPT2Config):
    """GPT-2's config and the design of its blocks."""

    model_type = "formix_gpt2"
    design: dict | None = None
    pruned_kv: bool = False  # see formix.models.kv_heads.prune_kv_heads


class FormixGPT2Attention(DesignedAttention):
    """Causal attention of any mixer with GPT-2's parameters `c_attn` (queries, keys, values side by side), `c_proj`."""

    def __init__(self, config: FormixGPT2Config, layer: LayerDesign) -> None:
        dim, heads = config.hidden_size, config.num_attention_heads
        if dim % heads:
            raise ValueError(f"num_attention_heads is {heads}; it must divide hidden_size, which is {dim}.")
        scale = (dim // heads) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= layer.index + 1
        super().__init__(
            layer, config, num_heads=heads, head_dim=dim // heads, dropout=config.attn_pdrop, scale=scale, causal=True
        )
        self.c_attn = Conv1D(dim + 2 * len(self.kv_heads.own) * self.head_dim, dim)
        self.c_proj = Conv1D(dim, dim)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, past_key_values: Any, source_kv: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """[B, N, C] -> [B, N, C] and this layer's own keys and values, those in the cache included."""
        own = len(self.kv_heads.own) * self.head_dim
        q, k, v = (self.split_heads(t) for t in self.c_attn(x).split([x.shape[2], own, own], dim=2))  # [B, H, N, D]
        q, k = self.normed(q, k)
        out, own_kv = self.mix(x, q, k, v, attention_mask, source_kv, past_key_values)
        return self.resid_dropout(self.c_proj(out)), own_kv

    def keep_kv_channels(self, channels: Tensor) -> None:
        old = self.c_attn
        if type(old) is not Conv1D:
            raise ValueError(f"c_attn is a {type(old).__name__}; merge adapters and dequantise before pruning.")
        dim, width = old.nx, len(self.kv_heads.own) * self.head_dim
        columns = torch.cat([torch.arange(dim), dim + channels, dim + width + channels]).to(old.weight.device)
        new = Conv1D(len(columns), dim)
        new.weight = nn.Parameter(old.weight.detach()[:, columns])
        new.bias = nn.Parameter(old.bias.detach()[columns])
        self.c_attn = new.train(old.training)


class FormixGPT2Block(DesignedBlock):
    """GPT-2's block in the order that the design's layout says."""

    def __init__(self, config: FormixGPT2Config, layer: LayerDesign) -> None:
        super().__init__(layer, "pre")
        dim, eps = config.hidden_size, config.layer_norm_epsilon
        first, second = norms_kept(layer, "pre")
        self.ln_1 = nn.LayerNorm(dim, eps=eps) if first else nn.Identity()
        self.ln_2 = nn.LayerNorm(dim, eps=eps) if second else nn.Identity()
        gated = isinstance(layer.mixer, GatedUnit)
        self.layer_idx = layer.index
        unit, drop = GatedUnitLayer.of, config.resid_pdrop
        self.attn: Any = unit(layer, dim, proj_drop=drop) if gated else FormixGPT2Attention(config, layer)
        self.mlp: Any = GPT2MLP(config.n_inner or 4 * dim, config) if layer.layout.ffn else None
        ends: list[Any] = [getattr(branch, "c_proj", None) for branch in (self.attn, self.mlp)]
        for last in filter(None, ends):
            last.ends_branch = True  # see _init_weights

    def mix(
        self, x: Tensor, attention_mask: Tensor | None, source_kv: KeyValue | None, past: Any, positions: Any
    ) -> tuple[Tensor, KeyValue | None]:
        if isinstance(self.attn, FormixGPT2Attention):
            return self.attn(x, attention_mask, past, source_kv)
        count_tokens(x, past, self.layer_idx)
        return self.attn(x), None

    def feed(self, x: Tensor) -> Tensor:
        return self.mlp(x)

    def norms(self) -> tuple[Any, Any]:
        return self.ln_1, self.ln_2


class FormixGPT2PreTrainedModel(Recorded, GPT2PreTrainedModel):
    """Initialisation as GPT-2's; attention weights are never materialised, so `attentions` cannot be returned."""

    config_class = FormixGPT2Config
    config: FormixGPT2Config
    _no_split_modules = ["FormixGPT2Block"]
    _can_record_outputs = {"hidden_states": FormixGPT2Block}
    _supports_flash_attn = False
    _supports_flex_attn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers gives classes outside itself no module that has no weights of its own, such as GPT2MLP
        if getattr(module, "ends_branch", False):
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)  # type: ignore[arg-type]


class FormixGPT2Model(FormixGPT2PreTrainedModel, GPT2Model):
    """GPT-2's trunk with a design's blocks."""

    def __init__(self, config: FormixGPT2Config) -> None:
        if config.add_cross_attention:
            raise ValueError("add_cross_attention is True; formix's GPT-2 is a decoder alone, set it to False.")
        with no_layers(config):
            super().__init__(config)
        self.layers = layer_designs(config, causal=True)
        self.h = nn.ModuleList(FormixGPT2Block(config, layer) for layer in self.layers)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """As transformers' `GPT2Model.forward`, whose `past_key_values` is `cache` since 5.24. Masks are tokenizer
        masks [batch, past + tokens] or boolean 4-D.

        With left padding pass `position_ids` too, as `generate` does: positions count from the first column if not.
        """
        check_inputs(self.config, input_ids, inputs_embeds, kwargs)
        check_mask(attention_mask)
        past_key_values, use_cache = cache_of(self, past_key_values, cache, use_cache)
        x: Any = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # [B, N, C]
        if position_ids is None:
            position_ids = next_positions(x, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: past_key_values},
        )
        x = x + self.wpe(position_ids)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids)
        x = run_layers(self.h, self.layers, self.drop(x), as_boolean(mask), past_key_values=past_key_values)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.ln_f(x), **{CACHE: past_key_values if use_cache else None}
        )


class _GPT2Head(WithHead):
    trunk_class = FormixGPT2Model


class FormixGPT2LMHeadModel(_GPT2Head, FormixGPT2PreTrainedModel, GPT2LMHeadModel):
    """Language model; the output projection is tied to the token embedding."""


class FormixGPT2ForSequenceClassification(_GPT2Head, FormixGPT2PreTrainedModel, GPT2ForSequenceClassification):
    """Classification or regression of the last token."""


class FormixGPT2ForTokenClassification(_GPT2Head, FormixGPT2PreTrainedModel, GPT2ForTokenClassification):
    """Classification of every token."""


class FormixGPT2ForQuestionAnswering(_GPT2Head, FormixGPT2PreTrainedModel, GPT2ForQuestionAnswering):
    """Start and end of the answer in a text."""
