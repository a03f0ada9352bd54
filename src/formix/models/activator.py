"""Activator, its gated-unit-only reduction, Uniform Activator and NiNformer, as their authors' code has them.

    activator      x += G(N x);  x += F(N x)         G(x) = (L(gelu(x W1 + b1)) * L(x W2 + b2)) W3 + b3
    activator_glu  x += G(N x)
    uniform        x += U(N x)                       U: G without L, of the model's own width
    ninformer      x += M(N x);  x += F(N x)         M(x) = (x Wp + bp) * MixerBlock(x)

(arXiv 2405.15953, 2403.02411). N and L are each one LayerNorm (eps 1e-5) used in both places: the published models tie
them. The classifier is a patch convolution, the blocks, the mean over tokens and a linear layer; there are no position
embedding, no class token and no final norm.

**Activator mixes no tokens.** In its first three forms a token's output depends on that token alone, so the blocks
commute with any permutation of the patches and the logits do not change when the patches are shuffled: the network is a
bag of patches. NiNformer mixes tokens by a linear layer over them, and so has a fixed number of tokens.

Forms without the tying, for any ViT, are the designs `activator` and `activator-glu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from formix.design import Design, GatedUnit, Layout
from formix.models.image import ImageModel, check_sizes
from formix.models.published import ACTIVATOR

DESIGNS: dict[str, Design | None] = {
    "activator": Design(mixer=GatedUnit(inner_norm=True), official=True),
    "activator_glu": Design(mixer=GatedUnit(inner_norm=True), layout=Layout(ffn=False), official=True),
    "uniform": Design(mixer=GatedUnit(ratio=1.0), layout=Layout(ffn=False)),
    "ninformer": None,  # its mixer is none of formix's designs
}


# official part -> its places in a ViT with the design `activator` or `activator-glu`; a tied norm has two
IN_A_VIT = {
    "norm": ("norm1", "norm2"),
    "actgu.proj_1": ("attn.fc1",),
    "actgu.proj_2": ("attn.fc2",),
    "actgu.proj_3": ("attn.fc3",),
    "actgu.norm": ("attn.norm", "attn.norm2"),
    "ffn.net.0": ("mlp.fc1",),
    "ffn.net.3": ("mlp.fc2",),
}


def vit_weights(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official weights of Activator under the names of a ViT of the same sizes, tied norms copied where it has two.

    The ViT is without position embedding, class token and final norm, and its norms have eps 1e-5; its design is
    `activator` or `activator-glu`, with `inner_norm` or `official`, or for the uniform kind `activator-glu(ratio=1)`.

    Raises:
        ValueError: a block's weight without a place in `model`, so that it would compute something else.
    """
    names = set(model.state_dict())
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        places = [key.replace("patcher.", "patch_embed.proj.").replace("classifier.", "head.")]
        if key.startswith("model."):
            _, layer, part = key.split(".", 2)
            part, kind = part.rsplit(".", 1)
            places = [f"blocks.{layer}.{place}.{kind}" for place in IN_A_VIT.get(part, ())]
        if key.startswith("model.") and not names.intersection(places):
            raise ValueError(
                f"{key} has no place in this ViT: give it the sizes of these weights and the design 'activator' or "
                "'activator-glu', with inner_norm=True or official=True, or 'activator-glu(ratio=1)'."
            )
        converted |= {place: tensor.clone() for place in places if place in names}
    return converted


class FeedForward(nn.Module):
    """F(x) = drop(drop(gelu(x W1 + b1)) W2 + b2) over the last dimension, of `dim` entries."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(drop), nn.Linear(hidden, dim), nn.Dropout(drop)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GatingUnit(nn.Module):
    """G(x) = (L(gelu(x W1 + b1)) * L(x W2 + b2)) W3 + b3 on [B, N, C], with one LayerNorm L or none."""

    def __init__(self, dim: int, hidden: int, *, norm: bool) -> None:
        super().__init__()
        self.proj_1 = nn.Linear(dim, hidden)
        self.proj_2 = nn.Linear(dim, hidden)
        self.proj_3 = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(hidden) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(nn.functional.gelu(self.proj_1(x)))  # [B, N, F]
        v = self.norm(self.proj_2(x))
        return self.proj_3(u * v)


class _OverTokens(nn.Module):
    """[B, N, C] -> [B, C, N], or back; stands at the official places in `token_mix`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class MixerBlock(nn.Module):
    """z += T(N_a z), T a feed-forward over the tokens; z += F(N_b z), F one over the channels (MLP-Mixer)."""

    def __init__(self, dim: int, num_tokens: int, hidden: int, drop: float) -> None:
        super().__init__()
        tokens = FeedForward(num_tokens, hidden, drop)
        self.token_mix = nn.Sequential(nn.LayerNorm(dim), _OverTokens(), tokens, _OverTokens())
        self.channel_mix = nn.Sequential(nn.LayerNorm(dim), FeedForward(dim, hidden, drop))

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.token_mix(z)  # [B, N, C]
        return z + self.channel_mix(z)


class MixerGatingUnit(nn.Module):
    """M(x) = (x Wp + bp) * MixerBlock(x) on [B, N, C]."""

    def __init__(self, dim: int, num_tokens: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.Mixer = MixerBlock(dim, num_tokens, hidden, drop)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) * self.Mixer(x)


class ActivatorBlock(nn.Module):
    """x += unit(N x), and x += F(N x) with the same norm N if the kind has a feed-forward."""

    def __init__(self, kind: str, dim: int, num_tokens: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        if kind == "ninformer":
            self.mgu = MixerGatingUnit(dim, num_tokens, hidden, drop)
        else:
            self.actgu = GatingUnit(dim, hidden, norm=kind != "uniform")
        self.ffn = FeedForward(dim, hidden, drop) if kind in ("activator", "ninformer") else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]"""
        h = self.norm(x)
        x = x + (self.mgu(h) if hasattr(self, "mgu") else self.actgu(h))
        return x if self.ffn is None else x + self.ffn(self.norm(x))


class ActivatorClassifier(ImageModel, nn.Module):
    """The authors' image classifier, with timm's methods.

    Args:
        kind: activator, activator_glu, uniform or ninformer.
        img_size, patch_size, in_chans, num_classes, global_pool ("avg" or ""), embed_dim, depth: as in timm.
        hidden_dim: F, the width inside units and feed-forwards; 512, but in uniform `embed_dim` and nothing else.
        drop_rate: dropout before the classifier, which the authors do not have.
        proj_drop_rate: p, dropout inside the feed-forwards; the kinds without them have none.
    """

    def __init__(
        self,
        kind: str = "activator",
        *,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        embed_dim: int = 256,
        hidden_dim: int | None = None,
        depth: int = 4,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.5,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"img_size is {height} x {width}; it must be a multiple of patch_size, {patch_size}.")
        if kind == "uniform" and hidden_dim not in (None, embed_dim):
            raise ValueError(
                f"hidden_dim is {hidden_dim}; units of Uniform Activator are as wide as its tokens: leave it out."
            )
        hidden = hidden_dim or (embed_dim if kind == "uniform" else 512)
        self.kind, self.size, self.patch_size, self.in_chans = kind, (height, width), patch_size, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_classes, self.global_pool, self.num_prefix_tokens = num_classes, _pool(global_pool), 0
        self.grad_checkpointing = False
        num_tokens = height * width // patch_size**2

        self.patcher = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        blocks = (ActivatorBlock(kind, embed_dim, num_tokens, hidden, proj_drop_rate) for _ in range(depth))
        self.model = nn.Sequential(*blocks)
        self.head_drop = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"model.{i}"} for i in range(depth)
        ]

    def __prepare_scriptable__(self) -> nn.Module:
        from formix.models.script import ScriptableActivator

        return ScriptableActivator(self)

    def img_size(self) -> tuple[int, int]:
        return self.size

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> tokens [B, N, C], row by row."""
        return self._run(self._tokens(x), {})

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, C] -> logits [B, classes]."""
        x = x.mean(dim=1) if self.global_pool == "avg" else x
        x = self.head_drop(x)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's: outputs of the blocks in `indices`; `norm` changes nothing, for there is no final norm."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NLC'.")
        take, last = feature_take_indices(len(self.model), indices)
        grid = tuple(n // self.patch_size for n in x.shape[-2:])
        taken: dict[int, Tensor] = dict.fromkeys(take, x)
        final = self._run(self._tokens(x), taken, last if stop_early else None)
        outputs = [taken[i] for i in sorted(set(take))]
        if output_fmt == "NCHW":
            outputs = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in outputs]
        return outputs if intermediates_only else (final, outputs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's: drop the blocks above the last index, and the head if asked."""
        take, last = feature_take_indices(len(self.model), indices)
        self.model = self.model[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, as timm's."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else _pool(global_pool)
        like: dict[str, Any] = {"device": self.patcher.weight.device, "dtype": self.patcher.weight.dtype}
        self.classifier = nn.Linear(self.num_features, num_classes, **like) if num_classes > 0 else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^patcher", "blocks": r"^model\.(\d+)"}

    def _tokens(self, x: Tensor) -> Tensor:
        if self.kind == "ninformer":
            check_size(x, self.size)
        return self.patcher(x).flatten(2).transpose(1, 2)  # [B, N, C]

    def _run(self, x: Tensor, taken: dict[int, Tensor], stop_after: int | None = None) -> Tensor:
        for i, block in enumerate(self.model):
            recompute = self.grad_checkpointing and self.training and torch.is_grad_enabled()
            x = checkpoint(block, x) if recompute else block(x)
            if i in taken:
                taken[i] = x
            if i == stop_after:
                break
        return x


@torch.fx.wrap  # the size is no number while FX traces
def check_size(x: Tensor, size: tuple[int, int]) -> None:
    """Raise `ValueError` for images [B, C, H, W] of another height or width."""
    if tuple(x.shape[-2:]) != size:
        raise ValueError(
            f"The image is {x.shape[-2]} x {x.shape[-1]}, but NiNformer's token mixing is built for "
            f"{size[0]} x {size[1]}: resize the image or give img_size."
        )


def _pool(global_pool: str) -> str:
    if global_pool not in ("", "avg"):
        raise ValueError(f"global_pool is {global_pool!r}; without a class token it must be 'avg' or ''.")
    return global_pool


def build(name: str, **arguments: Any) -> ActivatorClassifier:
    """The published model `name`; its design is fixed.

    Raises:
        ValueError: another design than the model's own.
    """
    check_sizes(arguments)
    kind = ACTIVATOR[name].arguments["kind"]
    design, asked = DESIGNS[kind], arguments.pop("design", None)
    if asked is not None and (design is None or (asked != design and asked != design.to_dict())):
        raise ValueError(
            f"{name!r} is a published architecture and its blocks are fixed; for other designs name a trunk that has "
            "none of its own, such as 'vit_tiny_patch16_224'."
        )
    placement = {k: arguments.pop(k) for k in ("device", "dtype") if k in arguments}
    if arguments.get("global_pool") is None:
        arguments.pop("global_pool", None)
    model = ActivatorClassifier(kind, **arguments).to(**placement)
    model.remember(name, arguments, design)
    return model
