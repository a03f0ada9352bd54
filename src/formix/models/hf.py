"""What the families on transformers' trunks share: the design in the config, layers and heads by design."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from formix.design import Design, LayerDesign, Pointwise
from formix.design import design as find_design
from formix.layers import attend, compose
from formix.layers.attention import GATES, KeyValue
from formix.layers.layout import Norm, norm_position
from formix.models.kv_heads import KeyValueHeads


def resolved_design(config: PreTrainedConfig) -> Design:
    """The design in a config.

    Raises:
        ValueError: the config has none: a formix model without a design could only come back as softmax.
    """
    stored = getattr(config, "design", None)
    if stored is None:
        raise ValueError(
            f"This {config.model_type} config has no design; create the model with formix.create_model, "
            f"or set design to one, such as formix.design('softmax').to_dict()."
        )
    return find_design(stored)


def layer_designs(config: PreTrainedConfig, *, causal: bool) -> list[LayerDesign]:
    """The design of every layer, refused where the model cannot have it."""
    chosen, depth = resolved_design(config), config.num_hidden_layers
    refusal = chosen.causal_refusal(depth) if causal else None
    if refusal:
        raise ValueError(refusal)
    layers = [chosen.layer(i, depth) for i in range(depth)]
    heads = [getattr(layer.mixer, "num_heads", None) or config.num_attention_heads for layer in layers]
    for layer in layers:
        if causal and isinstance(layer.mixer, Pointwise) and layer.mixer.length == "keys":
            raise ValueError(
                f"Layer {layer.index} has length='keys', all keys of a call, and in a decoder that number depends on "
                "what is in the cache: use length='visible' or a fixed number."
            )
        if layer.source is not None and heads[layer.index] != heads[layer.source]:
            raise ValueError(
                f"Layer {layer.index} has {heads[layer.index]} heads and reads those of layer {layer.source}, which "
                f"has {heads[layer.source]}: layers joined by skip wiring need the same number of heads."
            )
    return layers


@contextlib.contextmanager
def no_layers(config: PreTrainedConfig) -> Iterator[None]:
    """The config says zero layers inside: transformers' own constructors then build everything but the blocks."""
    depth, config.num_hidden_layers = config.num_hidden_layers, 0
    try:
        yield
    finally:
        config.num_hidden_layers = depth


class DesignedAttention(nn.Module):
    """What lies between the projections of a family's attention: norms of queries and keys, the mixer, the gate.

    A family's class adds the projections under transformers' names. `q_norm`, `k_norm` and `gate` exist if the mixer
    has them; the names are those of `formix.layers.Attention`.
    """

    def __init__(
        self,
        layer: LayerDesign,
        config: Any,
        *,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.layer_design, self.layer_idx, self.mixer = layer, layer.index, layer.mixer
        self.num_heads, self.head_dim, self.scaling, self.causal = num_heads, head_dim, scale, causal
        self.kv_heads = KeyValueHeads.of(layer, num_kv_heads or num_heads, pruned=config.pruned_kv)
        self.attn_dropout = nn.Dropout(dropout)
        self.gate_kind = getattr(layer.mixer, "gate", None)
        self.has_qk_norm = bool(getattr(layer.mixer, "qk_norm", False))
        if self.has_qk_norm:
            self.q_norm = nn.LayerNorm(head_dim, eps=1e-6, bias=False)
            self.k_norm = nn.LayerNorm(head_dim, eps=1e-6, bias=False)
        if self.gate_kind:
            self.gate = nn.Linear(config.hidden_size, num_heads * head_dim)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, N, h D] -> [B, h, N, D]"""
        return x.unflatten(-1, (x.shape[-1] // self.head_dim, self.head_dim)).transpose(1, 2)

    def normed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H, N, D], normalised if the mixer says so; before any rotation of positions."""
        return (self.q_norm(query), self.k_norm(key)) if self.has_qk_norm else (query, key)

    def mix(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        source_kv: KeyValue | None,
        past_key_values: Any = None,
    ) -> tuple[Tensor, KeyValue]:
        """What goes into the output projection, [B, N, H D], and the layer's own keys and values, those in the cache
        included. x: the layer's input, which the gate reads; query [B, H, N, D]; key and value [B, own heads, N, D]."""
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, own heads, past + N, D]
        own = (key, value)
        key, value = self.kv_heads.gather(own, source_kv)  # [B, Hkv, past + N, D]
        out = attend(
            self.mixer,
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=query.shape[2] > 1 and attention_mask is None and self.causal,  # a bool, shapes symbolic or not
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            scale=self.scaling,
        )
        out = out.transpose(1, 2).flatten(2)  # [B, N, H D]
        return (out * GATES[self.gate_kind](self.gate(x)) if self.gate_kind else out), own

    def prune_kv(self) -> None:
        """Keep of the key and value projections only the heads that this layer or a later one reads."""
        kept = KeyValueHeads.of(self.layer_design, self.kv_heads.total, pruned=True)
        places = torch.tensor([self.kv_heads.own.index(i) for i in kept.own], dtype=torch.long)
        channels = (places[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()
        self.keep_kv_channels(channels)
        self.kv_heads = kept

    def keep_kv_channels(self, channels: Tensor) -> None:
        """Replace the key and value projections by those with these output channels."""
        raise NotImplementedError


def linear_rows(linear: nn.Module, rows: Tensor) -> nn.Linear:
    """A linear layer with some of another's outputs.

    Raises:
        ValueError: it is not a plain `nn.Linear` (an adapter or a quantised layer).
    """
    if type(linear) is not nn.Linear:
        raise ValueError(f"A projection is a {type(linear).__name__}; merge adapters and dequantise before pruning.")
    bias = linear.bias is not None
    kept = nn.utils.skip_init(nn.Linear, linear.in_features, len(rows), bias=bias, dtype=linear.weight.dtype)
    kept.weight = nn.Parameter(linear.weight.detach()[rows.to(linear.weight.device)])
    if bias:
        kept.bias = nn.Parameter(linear.bias.detach()[rows.to(linear.bias.device)])
    return kept.train(linear.training)


class DesignedBlock(GradientCheckpointingLayer):
    """A family's layer in the order that the design's layout says; the family gives its parts."""

    def __init__(self, layer: LayerDesign, trunk: Norm) -> None:
        super().__init__()
        self.layer_design = layer
        self.layout, self.norm_position = layer.layout, norm_position(layer.layout, trunk)

    def mix(
        self, x: Tensor, attention_mask: Tensor | None, source_kv: KeyValue | None, past: Any, positions: Any
    ) -> tuple[Tensor, KeyValue | None]:
        """The mixer's branch, without residual and norm, and the layer's own keys and values."""
        raise NotImplementedError

    def feed(self, x: Tensor) -> Tensor:
        """The FFN's branch."""
        raise NotImplementedError

    def norms(self) -> tuple[Any, Any]:
        """The first and the second norm; the second is not asked for where norms are tied or there is no FFN."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        source_key: Tensor | None,
        source_value: Tensor | None,
        return_kv: bool,
        attention_mask: Tensor | None,
        positions: Any = None,
        past_key_values: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """[B, N, C] -> [B, N, C], and with `return_kv` also the layer's own keys and values for a later layer."""
        source_kv = None if source_key is None or source_value is None else (source_key, source_value)
        own: KeyValue | None = None

        def branch(h: Tensor) -> Tensor:
            nonlocal own
            out, own = self.mix(h, attention_mask, source_kv, past_key_values, positions)
            return out

        norm1, norm2 = self.norms()
        x = compose(
            hidden_states,
            branch,
            self.feed if self.layout.ffn else None,
            norm1,
            norm1 if self.layer_design.tied_norms else norm2,
            layout=self.layout,
            norm=self.norm_position,
        )
        if not return_kv:
            return x
        assert own is not None, "only a layer with keys can be the source of another"
        return x, *own


def padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """[B, 1, 1, N] boolean mask of the keys out of a tokenizer's [B, N] mask of ones and zeros; boolean masks of four
    dimensions, broadcastable to [B, H, N, N], pass as they are.

    Raises:
        ValueError: any other mask.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4 and attention_mask.dtype == torch.bool:
        return attention_mask
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)} and dtype {attention_mask.dtype}; pass a "
            "tokenizer's mask, [batch, tokens], or a boolean one of four dimensions, True = attend."
        )
    return attention_mask.to(torch.bool)[:, None, None, :]


def as_boolean(mask: Any) -> Tensor | None:
    """A mask of zeros and large negative numbers (transformers' "eager" form) as True = attend.

    Raises:
        ValueError: it has other numbers, which are no mask but a bias of the scores.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask
    visible = mask > torch.finfo(mask.dtype).min / 2
    if not torch.compiler.is_compiling() and bool((visible & (mask != 0)).any()):
        raise ValueError("attention_mask has 4 dimensions and numbers other than 0 and -inf; pass a boolean mask.")
    return visible


def check_mask(attention_mask: Any) -> None:
    """Raise `ValueError` for a decoder's mask of other than two or four dimensions; a dict holds one per layer type."""
    if isinstance(attention_mask, Tensor) and attention_mask.dim() not in (2, 4):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; pass a tokenizer's mask, [batch, tokens], or one "
            "of four dimensions, [batch, 1, queries, keys]."
        )


def check_inputs(
    config: PreTrainedConfig, input_ids: Tensor | None, inputs_embeds: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Raise `ValueError` unless a forward pass has one kind of input, and if it is to return attention weights, by its
    arguments or the config, or to read an encoder's output."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give either input_ids or inputs_embeds, not both and not neither.")
    asked = kwargs.get("output_attentions")
    if config.output_attentions if asked is None else asked:
        raise ValueError(
            "output_attentions is True, but formix never forms the matrix of attention weights: leave it False, in the "
            "config too."
        )
    if kwargs.get("encoder_hidden_states") is not None:
        raise ValueError("encoder_hidden_states is given, but formix's text models have no cross-attention to read it.")


def run_layers(modules: Any, layers: list[LayerDesign], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply the layers in turn, handing keys and values of source layers on to the layers that read them.

    Each module is called as module(x, source_key, source_value, return_kv, *args, **kwargs); the tensors go by
    position, so that gradient checkpointing sees them.
    """
    kept: dict[int, KeyValue] = {}
    for layer, module in zip(layers, modules, strict=True):
        readers = [other.source for other in layers[layer.index + 1 :]]
        source_kv = (None, None) if layer.source is None else kept[layer.source]
        wanted = layer.index in readers
        out = module(x, *source_kv, wanted, *args, **kwargs)
        if wanted:
            x, key, value = out
            kept[layer.index] = (key, value)
        else:
            x = out
        kept = {index: kv for index, kv in kept.items() if index in readers}
    return x


class WithHead:
    """A head of transformers on formix's trunk: its constructor runs without layers, then the trunk is put in."""

    trunk_class: Any
    reads_first_token = False  # and no other, so that blocks that mix no tokens would make it blind

    def __init__(self, config: Any) -> None:
        with no_layers(config):
            super().__init__(config)  # type: ignore[call-arg]
        name = self.base_model_prefix  # type: ignore[attr-defined]
        stock = getattr(self, name)
        options = {"add_pooling_layer": stock.pooler is not None} if hasattr(stock, "pooler") else {}
        setattr(self, name, self.trunk_class(config, **options))
        if self.reads_first_token and not resolved_design(config).mixes_tokens(config.num_hidden_layers):
            raise ValueError(
                "Activator mixes no tokens, and this head reads the first token alone: it would give the same answer "
                "for every input. Keep an attention mixer in some layers."
            )
        self.post_init()  # type: ignore[attr-defined]
