"""XCiT's trunk with any mixer that has keys, and SimA's released models, which are built on it.

timm's `Xcit` brings the convolutional stem, the Fourier position encoding, local patch interaction, layer scale and
stochastic depth (constant over depth); these agree with SimA's code. Parameter names are those of the official XCiT
and SimA code; timm's differ in two places (`pos_embed`, separate class-attention projections) and are mapped on load.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models.xcit import ClassAttentionBlock, Xcit
from torch import Tensor, nn

from formix.design import Design, Layout, Mixer, Sima
from formix.design import design as find_design
from formix.layers import Attention, attend
from formix.layers.attention import GATES
from formix.models.image import ImageModel, check_sizes
from formix.models.published import SIMA

_log = logging.getLogger("formix")
OFFICIAL_CLASS_EPS = 1e-6  # SimA's class attention has another bound than its blocks


torch.fx.wrap("attend")  # a node of FX graphs, as in formix.layers.attention


class ClassAttention(Attention):
    """The class token's attention to all N + 1 tokens: [B, N + 1, C] -> [B, 1, C].

    softmax, pointwise   O_0 = phi(q_0 K^T / sqrt(d)) V
    SimA                 O_0 = (sum_j q^_{0,j} k^_{:,j}) V,  q^ and k^ normalised over all N + 1 tokens

    As in the official code the weights of SimA's single row may be dropped (`attn_drop`).
    """

    def __init__(self, dim: int, num_heads: int, *, mixer: Mixer, eps: float, **timm_arguments: Any) -> None:
        super().__init__(dim, num_heads, mixer=mixer, **timm_arguments)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)  # [B, H, N + 1, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if isinstance(self.mixer, Sima):
            out = self._sima(q, k, v)
        else:
            dropout_p = self.attn_drop.p if self.training else 0.0
            out = attend(self.mixer, q[:, :, :1], k, v, dropout_p=dropout_p)
        out = out.transpose(1, 2).reshape(b, 1, self.attn_dim)  # [B, 1, C]
        if self.gate is not None:
            out = out * GATES[self.mixer.gate](self.gate(x[:, :1]))  # type: ignore[union-attr, index]
        return self.proj_drop(self.proj(out))

    def _sima(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        compute = torch.promote_types(q.dtype, torch.float32)
        norm_q, norm_k = (a.abs().sum(-2, keepdim=True, dtype=compute).clamp(min=self.eps) for a in (q, k))
        row = q[:, :, :1].to(compute) / norm_q / norm_k  # [B, H, 1, D]
        weights = self.attn_drop(row @ k.to(compute).transpose(-2, -1))  # [B, H, 1, N + 1]
        return (weights @ v.to(compute)).to(q.dtype)

    def mixer_flops(self, x: Tensor) -> int:
        """Operations of one row of weights and its sum of values."""
        return 4 * x.shape[0] * self.num_heads * x.shape[1] * self.head_dim


class ClassBlock(ClassAttentionBlock):
    """The class token attends and is fed forward; patch tokens pass unchanged (CaiT, arXiv 2103.17239, section 3.2).

    The official XCiT and SimA blocks also add g1 LN1(x) to the patch tokens and then double them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, N + 1, C] -> [B, N + 1, C]"""
        token = x[:, :1]
        token = token + self.drop_path1(self.gamma1 * self.attn(self.norm1(x)))
        token = token + self.drop_path2(self.gamma2 * self.mlp(self.norm2(token)))
        return torch.cat([token, x[:, 1:]], dim=1)


class FormixXcit(ImageModel, Xcit):
    """timm's `Xcit` with a design's mixer in place of cross-covariance attention and in class attention.

    With `official` in the design, class attention is that of the official code: eps 1e-6, patch tokens normalised
    (`tokens_norm`), fed through layer scale and doubled. Without, patch tokens pass the class blocks unchanged.
    In training mode, too, the model returns logits alone, unless `set_distilled_training` asks for SimA's pair.
    """

    distilled_training = False

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training mode return the logits twice, (x, x), as SimA's code does; the name is that of timm's DeiT."""
        self.distilled_training = enable

    def forward(self, x: Tensor) -> Any:
        """[B, C, H, W] -> logits [B, classes], or them twice."""
        logits = super().forward(x)
        return (logits, logits) if self.training and self.distilled_training else logits

    def __prepare_scriptable__(self) -> nn.Module:
        from formix.models import script

        return script.scriptable_xcit(self)

    @property
    def pos_embed(self) -> Any:  # type: ignore[override]
        """The position encoding, by the name that timm's methods use."""
        return getattr(self, "pos_embeder", None)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """SimA's code excludes nothing by name; XCiT's trunk the position encoding and the class token."""
        return set() if self.architecture in SIMA else {"pos_embeder.*", "cls_token"}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, of any weights that `adapt_checkpoint` knows: timm's `checkpoint_path` comes straight here."""
        return super().load_state_dict(self.adapt_checkpoint(dict(state_dict)), strict, assign)

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of SimA, the official XCiT or timm's XCiT under this model's names.

        XCiT's temperatures have no place here: they are dropped, and the log says so.
        """
        temperatures = [name for name in state if _TEMPERATURE.fullmatch(name)]
        for name in temperatures:
            del state[name]
        if temperatures:
            _log.warning("an XCiT checkpoint: dropped the temperatures of %d blocks", len(temperatures))
        for name in [n for n in state if n.startswith("pos_embed.")]:
            state["pos_embeder." + name.removeprefix("pos_embed.")] = state.pop(name)
        for i in range(len(self.cls_attn_blocks or ())):  # None: pruned with the head
            for kind in ("weight", "bias"):
                parts = [f"cls_attn_blocks.{i}.attn.{p}.{kind}" for p in "qkv"]
                if all(p in state for p in parts):
                    state[f"cls_attn_blocks.{i}.attn.qkv.{kind}"] = torch.cat([state.pop(p) for p in parts])
        return state


_TEMPERATURE = re.compile(r"blocks\.\d+\.attn\.temperature")


def build(name: str, **arguments: Any) -> FormixXcit:
    """SimA's model `name`, or ``formix_xcit``, which is timm's model `base` in a `design` (XCiT-S12/16 in SimA)."""
    check_sizes(arguments)
    if name in SIMA:
        chosen = find_design(arguments.pop("design", None) or find_design("sima", official=True))
        trunk: Any = Xcit(**{**SIMA[name].arguments, **arguments})
    else:
        arguments = {"base": "xcit_small_12_p16_224"} | arguments
        chosen = find_design(arguments.pop("design", "sima"))
        trunk = timm.create_model(arguments["base"], **{k: v for k, v in arguments.items() if k != "base"})
    model = _with_design(trunk, chosen)
    model.remember(name, arguments, chosen)
    return model


def create_xcit(base: str, design: str | Design | None, *, pretrained: bool = False, **kwargs: Any) -> FormixXcit:
    """timm's model `base` (``xcit_small_12_p16_224``) with its attention in `design`; `kwargs` go to timm.

    Raises:
        ValueError: no design (XCiT's own mixer, cross-covariance attention, is none of formix's), or one that the
            trunk cannot have.
    """
    if design is None:
        raise ValueError(
            f"{base!r} has cross-covariance attention, which is no design of formix's: name a design, such as "
            f"design='sima', or make XCiT itself with timm.create_model({base!r})."
        )
    try:
        # as plain data: timm's save_for_hf writes the arguments
        model: Any = timm.create_model("formix_xcit", base=base, design=find_design(design).to_dict(), **kwargs)
    except (TypeError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise ValueError(f"timm cannot build {base!r} with {kwargs}: {error}") from None
    if pretrained:
        source: Any = timm.create_model(base, pretrained=True, **kwargs)
        model.pretrained_cfg = {**model.pretrained_cfg, **dict(source.pretrained_cfg)}
        model.load_state_dict(source.state_dict(), strict=True)
    return model


def _with_design(trunk: Any, design: Design) -> Any:
    """timm's `Xcit` as a `FormixXcit`, in place, its attentions of the design and initialised anew.

    Raises:
        ValueError: another class, or a layout, wiring or mixer that XCiT cannot have.
    """
    if trunk.__class__ is not Xcit:
        raise ValueError(f"This is a {type(trunk).__name__}; formix_xcit takes timm's xcit_* names.")
    depth = len(trunk.blocks)
    layers = [design.layer(i, depth) for i in range(depth)]
    if design.wiring is not None or any(layer.layout != Layout() for layer in layers):
        raise ValueError("XCiT's blocks (attention, local patch interaction, FFN) have one layout and no skip wiring.")
    if not all(mixer.has_keys for mixer in (*(layer.mixer for layer in layers), design.mixer)):
        raise ValueError("XCiT's class token reads the image by attention; a gated unit mixes no tokens. Use another.")
    if trunk.pos_embed is not None:
        trunk.pos_embeder = trunk.pos_embed
        del trunk.pos_embed
    trunk.__class__ = FormixXcit  # the trunk is timm's own in all but its mixers
    block: Any
    for block, layer in zip(trunk.blocks, layers, strict=True):
        block.layer_design = layer
        block.attn = Attention(mixer=layer.mixer, **_arguments(block.attn, block.attn.qkv))
    for block in trunk.cls_attn_blocks:
        eps = OFFICIAL_CLASS_EPS if design.official else getattr(design.mixer, "eps", 0.0)
        block.attn = ClassAttention(mixer=design.mixer, eps=eps, **_arguments(block.attn, block.attn.q))
        if not design.official:
            block.__class__ = ClassBlock
    trunk.apply(trunk._init_weights)
    return trunk


def _arguments(attn: Any, projection: nn.Linear) -> dict[str, Any]:
    """What timm built an attention with."""
    return {
        "dim": projection.in_features,
        "num_heads": attn.num_heads,
        "qkv_bias": projection.bias is not None,
        "attn_drop": attn.attn_drop.p,
        "proj_drop": attn.proj_drop.p,
        "device": projection.weight.device,
        "dtype": projection.weight.dtype,
    }
