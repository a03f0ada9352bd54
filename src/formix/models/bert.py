"""BERT with blocks of any design; parameter names of transformers' BERT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, BertPreTrainedModel, BertSelfOutput
from transformers.pytorch_utils import apply_chunking_to_forward
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from formix.design import GatedUnit, LayerDesign, Sima
from formix.layers import GatedUnit as GatedUnitLayer
from formix.layers.attention import KeyValue
from formix.layers.layout import norms_kept
from formix.models.hf import (
    DesignedAttention,
    DesignedBlock,
    WithHead,
    check_inputs,
    layer_designs,
    linear_rows,
    no_layers,
    padding_mask,
    run_layers,
)
from formix.models.recorded import Recorded


class FormixBertConfig(BertConfig):
    """BERT's config and the design of its blocks."""

    model_type = "formix_bert"
    design: dict | None = None
    pruned_kv: bool = False  # see formix.models.kv_heads.prune_kv_heads


class BertSelfAttention(DesignedAttention):
    """The mixer between BERT's `query`, `key` and `value` and its output projection."""

    def __init__(self, config: Any, layer: LayerDesign) -> None:
        dim, mixer = config.hidden_size, layer.mixer
        heads = (mixer.num_heads if isinstance(mixer, Sima) else None) or config.num_attention_heads
        if dim % heads:
            raise ValueError(f"The number of heads is {heads}; it must divide hidden_size, which is {dim}.")
        dropout = config.attention_probs_dropout_prob
        super().__init__(layer, config, num_heads=heads, head_dim=dim // heads, dropout=dropout)
        own = len(self.kv_heads.own) * self.head_dim
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, own), nn.Linear(dim, own)

    def forward(self, x: Tensor, attn_mask: Tensor | None, source_kv: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """[B, N, C] -> [B, N, C] and this layer's own keys and values."""
        q, k, v = (self.split_heads(linear(x)) for linear in (self.query, self.key, self.value))  # [B, H, N, D]
        q, k = self.normed(q, k)
        return self.mix(x, q, k, v, attn_mask, source_kv)

    def keep_kv_channels(self, channels: Tensor) -> None:
        self.key, self.value = linear_rows(self.key, channels), linear_rows(self.value, channels)


class BertAttention(nn.Module):
    """BERT's `attention`: the mixer in `self`, the projection and the first norm in `output`."""

    def __init__(self, config: Any, layer: LayerDesign) -> None:
        super().__init__()
        self.output: Any
        self.unit: Any = None
        if isinstance(layer.mixer, GatedUnit):
            self.unit = GatedUnitLayer.of(layer, config.hidden_size, proj_drop=config.hidden_dropout_prob)
            self.output = nn.Module()
            self.output.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        else:
            self.self = BertSelfAttention(config, layer)
            self.output = BertSelfOutput(config)
        if not norms_kept(layer, "post")[0]:
            self.output.LayerNorm = nn.Identity()

    def forward(
        self, x: Tensor, attn_mask: Tensor | None, source_kv: KeyValue | None
    ) -> tuple[Tensor, KeyValue | None]:
        """The mixer's branch, without residual and norm."""
        if self.unit is not None:
            return self.unit(x), None
        mixed, own = self.self(x, attn_mask, source_kv)
        return self.output.dropout(self.output.dense(mixed)), own


class FormixBertLayer(DesignedBlock):
    """BERT's and RoBERTa's layer in the order that the design's layout says.

    Post-norm series is BERT's own. Post-norm parallel is PAF (arXiv 2305.13297):
    y = LN2(x + Drop(A(x)) + Drop(F(x))), with two independent dropouts. With `official` the norm that PAF never
    applies, `attention.output.LayerNorm`, stays as a parameter without gradient, as in the official checkpoints.
    """

    def __init__(self, config: Any, layer: LayerDesign) -> None:
        super().__init__(layer, "post")
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention = BertAttention(config, layer)
        self.output: Any = None
        if layer.layout.ffn:
            self.intermediate = BertIntermediate(config)
            self.output = BertOutput(config)
            if not norms_kept(layer, "post")[1]:
                self.output.LayerNorm = nn.Identity()

    def mix(
        self, x: Tensor, attention_mask: Tensor | None, source_kv: KeyValue | None, past: Any, positions: Any
    ) -> tuple[Tensor, KeyValue | None]:
        return self.attention(x, attention_mask, source_kv)

    def feed(self, x: Tensor) -> Tensor:
        return apply_chunking_to_forward(self._feed_chunk, self.chunk_size_feed_forward, 1, x)

    def _feed_chunk(self, x: Tensor) -> Tensor:
        return self.output.dropout(self.output.dense(self.intermediate(x)))

    def norms(self) -> tuple[Any, Any]:
        return self.attention.output.LayerNorm, self.output.LayerNorm if self.layout.ffn else None


class FormixBertEncoder(nn.Module):
    """The layers in turn, with skip wiring."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = layer_designs(config, causal=False)
        self.layer = nn.ModuleList(FormixBertLayer(config, layer) for layer in self.layers)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        return run_layers(self.layer, self.layers, hidden_states, attention_mask)


class EncoderTrunk:
    """The constructor and the forward pass of BERT's and RoBERTa's trunk; embeddings and pooler are transformers'."""

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
        if config.is_decoder or config.add_cross_attention:
            raise ValueError(
                f"is_decoder or add_cross_attention is True; a {config.model_type} is an encoder, set both to False."
            )
        positions = getattr(config, "position_embedding_type", None) or "absolute"
        if positions != "absolute":  # a field of older configs
            raise ValueError(
                f"position_embedding_type is {positions!r}; this model has 'absolute' positions alone, as "
                "transformers' has today, and would give other logits than the weights were trained for."
            )
        with no_layers(config):
            super().__init__(config, add_pooling_layer=add_pooling_layer)  # type: ignore[call-arg]
        self.encoder: Any = FormixBertEncoder(config)
        self.post_init()  # type: ignore[attr-defined]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """As transformers' `BertModel.forward` of an encoder; `attention_mask` is a tokenizer's, [batch, tokens]."""
        check_inputs(self.config, input_ids, inputs_embeds, kwargs)
        x = self.embeddings(
            input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids, inputs_embeds=inputs_embeds
        )
        x = self.encoder(x, padding_mask(attention_mask))  # [B, N, C]
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=x, pooler_output=None if self.pooler is None else self.pooler(x)
        )


class FormixBertPreTrainedModel(Recorded, BertPreTrainedModel):
    """Initialisation as BERT's; attention weights are never materialised, so `attentions` cannot be returned."""

    config_class = FormixBertConfig
    config: FormixBertConfig
    _no_split_modules = ["BertEmbeddings", "FormixBertLayer"]
    _can_record_outputs = {"hidden_states": FormixBertLayer}
    _supports_flash_attn = False
    _supports_flex_attn = False


class FormixBertModel(EncoderTrunk, FormixBertPreTrainedModel, BertModel):
    """BERT's encoder with a design's blocks."""


class _BertHead(WithHead):
    trunk_class = FormixBertModel


class FormixBertForMaskedLM(_BertHead, FormixBertPreTrainedModel, BertForMaskedLM):
    """Masked language model; the output projection is tied to the token embedding."""


class FormixBertForSequenceClassification(_BertHead, FormixBertPreTrainedModel, BertForSequenceClassification):
    """Classification or regression of a sequence or a pair, from the pooled first token."""

    reads_first_token = True


class FormixBertForMultipleChoice(_BertHead, FormixBertPreTrainedModel, BertForMultipleChoice):
    """Choice among several sequences, from the pooled first token of each."""

    reads_first_token = True


class FormixBertForTokenClassification(_BertHead, FormixBertPreTrainedModel, BertForTokenClassification):
    """Classification of every token."""


class FormixBertForQuestionAnswering(_BertHead, FormixBertPreTrainedModel, BertForQuestionAnswering):
    """Start and end of the answer in a text."""
