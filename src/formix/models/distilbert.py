"""DistilBERT with blocks of any design: transformers' embeddings and heads around BERT's layers.

The parameters of the layers have BERT's names (`encoder.layer.0.attention.self.query`), not DistilBERT's
(`transformer.layer.0.attention.q_lin`); `formix.convert` carries a checkpoint over.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert.modeling_distilbert import DistilBertPreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from formix.models.bert import FormixBertEncoder, FormixBertLayer
from formix.models.hf import WithHead, check_inputs, no_layers, padding_mask
from formix.models.recorded import Recorded


class FormixDistilBertConfig(DistilBertConfig):
    """DistilBERT's config, readable in BERT's words too, and the design of its blocks."""

    model_type = "formix_distilbert"
    attribute_map = {
        **DistilBertConfig.attribute_map,
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    }
    layer_norm_eps: float = 1e-12
    design: dict | None = None
    pruned_kv: bool = False  # see formix.models.kv_heads.prune_kv_heads


class FormixDistilBertPreTrainedModel(Recorded, DistilBertPreTrainedModel):
    """Initialisation as DistilBERT's; attention weights are never materialised, so `attentions` cannot be returned."""

    config_class = FormixDistilBertConfig
    config: FormixDistilBertConfig
    _no_split_modules = ["Embeddings", "FormixBertLayer"]
    _can_record_outputs = {"hidden_states": FormixBertLayer}
    _supports_flash_attn = False
    _supports_flex_attn = False


class FormixDistilBertModel(FormixDistilBertPreTrainedModel, DistilBertModel):
    """DistilBERT's encoder with a design's blocks."""

    def __init__(self, config: FormixDistilBertConfig) -> None:
        with no_layers(config):
            super().__init__(config)
        del self.transformer
        self.encoder: Any = FormixBertEncoder(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """As transformers' `DistilBertModel.forward`; `attention_mask` is a tokenizer's, [batch, tokens], and
        `token_type_ids`, which DistilBERT has no embedding for, are taken and not read."""
        check_inputs(self.config, input_ids, inputs_embeds, kwargs)
        x = self.embeddings(input_ids, inputs_embeds, position_ids)
        return BaseModelOutput(last_hidden_state=self.encoder(x, padding_mask(attention_mask)))  # [B, N, C]


class _DistilBertHead(WithHead):
    trunk_class = FormixDistilBertModel


class FormixDistilBertForMaskedLM(_DistilBertHead, FormixDistilBertPreTrainedModel, DistilBertForMaskedLM):
    """Masked language model; the output projection is tied to the token embedding."""


class FormixDistilBertForSequenceClassification(
    _DistilBertHead, FormixDistilBertPreTrainedModel, DistilBertForSequenceClassification
):
    """Classification or regression of a sequence or a pair, from the first token."""

    reads_first_token = True


class FormixDistilBertForMultipleChoice(_DistilBertHead, FormixDistilBertPreTrainedModel, DistilBertForMultipleChoice):
    """Choice among several sequences, from the first token of each."""

    reads_first_token = True


class FormixDistilBertForTokenClassification(
    _DistilBertHead, FormixDistilBertPreTrainedModel, DistilBertForTokenClassification
):
    """Classification of every token."""


class FormixDistilBertForQuestionAnswering(
    _DistilBertHead, FormixDistilBertPreTrainedModel, DistilBertForQuestionAnswering
):
    """Start and end of the answer in a text."""
