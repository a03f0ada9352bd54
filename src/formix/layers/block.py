"""The block: a mixer, an FFN and their norms in the order that the design's layout says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from timm.layers import DropPath, LayerNorm, LayerScale, Mlp, register_notrace_module
from torch import Tensor, nn

from formix.design import Design, LayerDesign, Sima
from formix.design import GatedUnit as GatedUnitMixer
from formix.design import design as find_design
from formix.layers.attention import Attention, KeyValue
from formix.layers.fused import FusedParallel
from formix.layers.gated_unit import GatedUnit
from formix.layers.layout import Norm, compose, norm_position, norms_kept


@register_notrace_module  # as Attention: the joined form of parallel blocks reads its parts' weights
class Block(nn.Module):
    """A transformer block of any design on [B, N, C], with timm's constructor words and parameter names.

    Args:
        dim, num_heads, mlp_ratio, qkv_bias, qk_norm, scale_attn_norm, scale_mlp_norm, proj_bias, proj_drop,
        attn_drop, init_values, drop_path, act_layer, norm_layer, mlp_layer: as in timm's `Block`, whose LayerNorm has
            eps 1e-6.
        design: a design's name, a `Design` or one layer of it (`Design.layer`).
        norm: where the norms stand unless the design's layout says it: "pre" (ViT, GPT-2) or "post" (BERT).

    A parallel layout keeps the separate parameters and computes both branches with one input and one output
    projection wherever that is the same function, that is, without active dropout (`formix.layers.fused`).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        *,
        design: str | Design | LayerDesign = "softmax",
        norm: Norm = "pre",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        layer = design if isinstance(design, LayerDesign) else find_design(design).layer(0, 1)
        self.layer_design = layer
        self.layout = layer.layout
        self.norm_position: Norm = norm_position(layer.layout, norm)

        first, second = norms_kept(layer, norm)
        self.norm1 = norm_layer(dim, **dd) if first else nn.Identity()
        self.norm2 = None
        if not layer.tied_norms:
            self.norm2 = norm_layer(dim, **dd) if second else nn.Identity()

        def residual_parts() -> tuple[nn.Module, nn.Module]:
            scale = LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()
            return scale, DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.attn = make_mixer(
            layer,
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            **dd,
        )
        self.ls1, self.drop_path1 = residual_parts()
        self.mlp = None
        if layer.layout.ffn:
            self.mlp = mlp_layer(
                in_features=dim,
                hidden_features=int(dim * mlp_ratio),
                act_layer=act_layer,
                norm_layer=norm_layer if scale_mlp_norm else None,
                bias=proj_bias,
                drop=proj_drop,
                **dd,
            )
            self.ls2, self.drop_path2 = residual_parts()
        self._fused = FusedParallel() if FusedParallel.fits(self) else None

    def train(self, mode: bool = True) -> Block:
        """As every module's; weights that were joined for evaluation are dropped."""
        if self._fused is not None:
            self._fused.forget()
        return super().train(mode)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        source_kv: KeyValue | None = None,
        return_kv: bool = False,
    ) -> Tensor | tuple[Tensor, KeyValue]:
        """[B, N, C] -> [B, N, C], and with `return_kv` also the layer's own keys and values for a later layer.

        Raises:
            ValueError: a layer that reads an earlier one, without `source_kv`.
        """
        layer = self.layer_design
        if layer.source is not None and source_kv is None:
            raise ValueError(
                f"Layer {layer.index} reads the keys and values of layer {layer.source} and has been given none: call "
                "all blocks of the model at once, model.blocks(x), or pass source_kv."
            )
        own: KeyValue | None = None

        def mix(h: Tensor) -> Tensor:
            nonlocal own
            if isinstance(self.attn, Attention):
                out, own = self.attn(h, attn_mask, is_causal, source_kv, return_kv=True)
            else:
                out = self.attn(h, attn_mask, is_causal)
            return self.drop_path1(self.ls1(out))

        def feed(h: Tensor) -> Tensor:
            return self.drop_path2(self.ls2(self.mlp(h)))  # type: ignore[misc]

        if self._fused is not None and self._fused.active(self):
            h = self.norm1(x) if self.norm_position == "pre" else x
            branches, own = self._fused(self, h, attn_mask, is_causal, source_kv)
            x = x + branches if self.norm_position == "pre" else self.norm2(x + branches)  # type: ignore[misc]
        else:
            norm2 = self.norm1 if self.norm2 is None else self.norm2
            ffn = None if self.mlp is None else feed
            x = compose(x, mix, ffn, self.norm1, norm2, layout=self.layout, norm=self.norm_position)
        if not return_kv:
            return x
        assert own is not None, "only a layer with keys can be the source of another"
        return x, own


def make_mixer(layer: LayerDesign, dim: int, num_heads: int, **timm: Any) -> Attention | GatedUnit:
    """The mixer of one layer as a module, from timm's words for attention."""
    mixer = layer.mixer
    if isinstance(mixer, GatedUnitMixer):
        return GatedUnit.of(layer, dim, proj_drop=timm["proj_drop"], device=timm["device"], dtype=timm["dtype"])
    heads = mixer.num_heads or num_heads if isinstance(mixer, Sima) else num_heads
    return Attention(dim, num_heads, mixer=mixer, skip_heads=layer.skip_heads(heads), **timm)


class BlockStack(nn.Sequential):
    """Blocks in sequence, the keys and values of source layers handed on to the layers that read them.

    With `grad_checkpointing`, activations inside each block are recomputed in the backward pass; keys and values
    that cross blocks are inputs and outputs of the recomputed function, so gradients reach their source.
    """

    grad_checkpointing = False

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        intermediates: dict[int, Tensor] | None = None,
        stop_after: int | None = None,
    ) -> Tensor:
        """[B, N, C] -> [B, N, C]; outputs of the layers that are keys of `intermediates` are stored in it.

        Raises:
            ValueError: these are a part of a model's blocks, and one reads a layer that is left out.
        """
        blocks: list[Block] = list(self)  # type: ignore[arg-type]
        sources = [block.layer_design.source for block in blocks]
        kept: dict[int, KeyValue] = {}  # by the layer's number in its model, of which these may be a part
        for i, block in enumerate(blocks):
            layer, source, readers = block.layer_design.index, sources[i], sources[i + 1 :]
            args = (x, attn_mask, is_causal, None if source is None else kept.get(source), layer in readers)
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                out = torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)
            else:
                out = block(*args)
            if layer in readers:
                x, kept[layer] = out
            else:
                x = out
            kept = {source: kv for source, kv in kept.items() if source in readers}
            if intermediates is not None and i in intermediates:
                intermediates[i] = x
            if i == stop_after:
                break
        return x
