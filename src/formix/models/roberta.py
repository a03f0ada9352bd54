"""RoBERTa with blocks of any design; parameter names of transformers' RoBERTa, whose layer is BERT's."""

from __future__ import annotations

from transformers import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)
from transformers.models.roberta.modeling_roberta import RobertaPreTrainedModel

from formix.models.bert import EncoderTrunk, FormixBertLayer
from formix.models.hf import WithHead
from formix.models.recorded import Recorded


class FormixRobertaConfig(RobertaConfig):
    """RoBERTa's config and the design of its blocks."""

    model_type = "formix_roberta"
    design: dict | None = None
    pruned_kv: bool = False  # see formix.models.kv_heads.prune_kv_heads


class FormixRobertaPreTrainedModel(Recorded, RobertaPreTrainedModel):
    """Initialisation as RoBERTa's; attention weights are never materialised, so `attentions` cannot be returned."""

    config_class = FormixRobertaConfig
    config: FormixRobertaConfig
    _no_split_modules = ["RobertaEmbeddings", "FormixBertLayer"]
    _can_record_outputs = {"hidden_states": FormixBertLayer}
    _supports_flash_attn = False
    _supports_flex_attn = False


class FormixRobertaModel(EncoderTrunk, FormixRobertaPreTrainedModel, RobertaModel):
    """RoBERTa's encoder with a design's blocks."""


class _RobertaHead(WithHead):
    trunk_class = FormixRobertaModel


class FormixRobertaForMaskedLM(_RobertaHead, FormixRobertaPreTrainedModel, RobertaForMaskedLM):
    """Masked language model; the output projection is tied to the token embedding."""


class FormixRobertaForSequenceClassification(
    _RobertaHead, FormixRobertaPreTrainedModel, RobertaForSequenceClassification
):
    """Classification or regression of a sequence or a pair, from the first token."""

    reads_first_token = True


class FormixRobertaForMultipleChoice(_RobertaHead, FormixRobertaPreTrainedModel, RobertaForMultipleChoice):
    """Choice among several sequences, from the pooled first token of each."""

    reads_first_token = True


class FormixRobertaForTokenClassification(_RobertaHead, FormixRobertaPreTrainedModel, RobertaForTokenClassification):
    """Classification of every token."""


class FormixRobertaForQuestionAnswering(_RobertaHead, FormixRobertaPreTrainedModel, RobertaForQuestionAnswering):
    """Start and end of the answer in a text."""
