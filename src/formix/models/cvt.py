"""CvT (arXiv 2103.15808) with any mixer that has keys; parameter names of transformers' CvT, whose weights load.

transformers' `CvtSelfAttention` writes its softmax out between two einsums: it neither calls the attention interface
nor has another hook, so the attention is subclassed here. Convolutions of stride 2 make a quarter as many keys as
queries; SimA normalises queries over the queries and keys over the keys. Scores are scaled by C^-1/2 with the stage's
whole width C, as in CvT, for every mixer that has scores; SimA has no scale.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, CvtConfig, CvtForImageClassification, CvtModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.cvt.modeling_cvt import CvtLayer, CvtPreTrainedModel, CvtSelfAttention

from formix.design import Design, LayerDesign, Sima
from formix.design import design as find_design
from formix.layers import attend, compose
from formix.layers.attention import GATES
from formix.layers.layout import norm_position, norms_used
from formix.models.image import check_sizes
from formix.models.loading import check_loaded, known_fields, read_weights, refusals_named

# name -> fields of transformers' config that differ from its defaults, which are those of CvT-13
SIZES: dict[str, dict[str, Any]] = {
    "cvt-13": {},
    "cvt-21": {"depth": [1, 4, 16]},
    "cvt-w24": {
        "depth": [2, 2, 20],
        "embed_dim": [192, 768, 1024],
        "num_heads": [3, 12, 16],
        "drop_path_rate": [0.0, 0.0, 0.3],
    },
}


class FormixCvtConfig(CvtConfig):
    """CvT's config and the design of its blocks."""

    model_type = "formix_cvt"
    design: dict | None = None


class FormixCvtSelfAttention(CvtSelfAttention):
    """CvT's convolutional and linear projections with a mixer between them and the output projection."""

    def __init__(self, *args: Any, layer: LayerDesign) -> None:
        super().__init__(*args)
        mixer = layer.mixer
        if isinstance(mixer, Sima) and mixer.num_heads is not None:
            self.num_heads = mixer.num_heads
        if self.embed_dim % self.num_heads:
            raise ValueError(f"The number of heads is {self.num_heads}; it must divide the width, {self.embed_dim}.")
        self.mixer, self.head_dim = mixer, self.embed_dim // self.num_heads
        if getattr(mixer, "qk_norm", False):
            self.q_norm = nn.LayerNorm(self.head_dim, eps=1e-6, bias=False)
            self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6, bias=False)
        self.gate = nn.Linear(self.embed_dim, self.embed_dim) if getattr(mixer, "gate", None) else None

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        """[B, N, C] -> [B, N, C]; N is height x width, and one more in the stage with the class token."""
        b, n, c = hidden_state.shape
        prefix, patches = hidden_state.split([n - height * width, height * width], dim=1)
        grid = patches.transpose(1, 2).reshape(b, c, height, width)

        def heads(convolution: nn.Module, linear: nn.Module) -> Tensor:
            tokens = torch.cat([prefix, convolution(grid)], dim=1)  # [B, Nq or Nk, C]
            return linear(tokens).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        q = heads(self.convolution_projection_query, self.projection_query)  # [B, H, Nq, D]
        k = heads(self.convolution_projection_key, self.projection_key)  # [B, H, Nk, D]
        v = heads(self.convolution_projection_value, self.projection_value)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        dropout_p = self.dropout.p if self.training else 0.0
        out = attend(self.mixer, q, k, v, dropout_p=dropout_p, scale=self.scale)
        out = out.transpose(1, 2).reshape(b, n, c)
        return out if self.gate is None else out * GATES[self.mixer.gate](self.gate(hidden_state))  # type: ignore[union-attr, index]

    def mixer_flops(self, x: Tensor) -> int:
        """Operations of the mixer for x [B, N, C]: as many queries as tokens, keys of the strided grid."""
        b, n, c = x.shape
        side = int((n - self.with_cls_token) ** 0.5)
        strided: Any = self.convolution_projection_key.convolution_projection.convolution
        keys = ((side + 2 * strided.padding[0] - strided.kernel_size[0]) // strided.stride[0] + 1) ** 2
        keys += int(self.with_cls_token)
        quadratic = 4 * b * n * keys * c
        return min(quadratic, 2 * b * (n + keys) * c * self.head_dim) if isinstance(self.mixer, Sima) else quadratic


class FormixCvtLayer(GradientCheckpointingLayer, CvtLayer):
    """CvT's layer in the order that the design's layout says, its residual branches dropped as branches."""

    layernorm_before: Any
    layernorm_after: Any

    def __init__(self, *args: Any, attention: tuple[Any, ...], layer: LayerDesign) -> None:
        super().__init__(*args)
        self.layout, self.norm_position = layer.layout, norm_position(layer.layout, "pre")
        self.attention.attention = FormixCvtSelfAttention(*attention, layer=layer)
        uses_first, uses_second = norms_used(layer.layout, "pre")
        if not uses_first:
            self.layernorm_before = nn.Identity()
        if not uses_second:
            self.layernorm_after = nn.Identity()
        if not layer.layout.ffn:
            del self.intermediate, self.output

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        """[B, N, C] -> [B, N, C]"""

        def mix(h: Tensor) -> Tensor:
            return self.drop_path(self.attention(h, height, width))

        def feed(h: Tensor) -> Tensor:
            return self.drop_path(self.output.dropout(self.output.dense(self.intermediate(h))))

        return compose(
            hidden_state,
            mix,
            feed if self.layout.ffn else None,
            self.layernorm_before,
            self.layernorm_after,
            layout=self.layout,
            norm=self.norm_position,
        )


@contextlib.contextmanager
def _few_layers(config: Any) -> Iterator[None]:
    """The config says few layers inside: transformers' constructors build the rest, and the layers are replaced. (They
    need one layer more in each stage than in the one before, because they index their drop rates by the stage.)"""
    depth, config.depth = config.depth, [stage + 1 for stage in range(len(config.depth))]
    try:
        yield
    finally:
        config.depth = depth


def _put_layers(encoder: Any, config: Any) -> None:
    """Replace the encoder's layers by those of the design; stochastic depth rises linearly within each stage."""
    if config.design is None:
        raise ValueError("This formix_cvt config has no design; create the model with formix.create_model.")
    design, depth = find_design(config.design), sum(config.depth)
    layers = [design.layer(i, depth) for i in range(depth)]
    if design.wiring is not None:
        raise ValueError("CvT's stages have different widths and token counts: no layer can read another's keys.")
    if not all(layer.mixer.has_keys for layer in layers):
        raise ValueError("CvT projects queries and keys by convolutions, and a gated unit has none. Use another mixer.")
    remaining = iter(layers)
    for s, stage in enumerate(encoder.stages):
        attention = (
            config.num_heads[s], config.embed_dim[s], config.kernel_qkv[s], config.padding_q[s], config.padding_kv[s],
            config.stride_q[s], config.stride_kv[s], config.qkv_projection_method[s], config.qkv_bias[s],
            config.attention_drop_rate[s],
        )  # fmt: skip
        token = config.cls_token[s]
        rates = torch.linspace(0, config.drop_path_rate[s], config.depth[s], device="cpu").tolist()
        stage.layers = nn.Sequential(
            *(
                FormixCvtLayer(
                    *attention,
                    config.drop_rate[s],
                    config.mlp_ratio[s],
                    rate,
                    token,
                    attention=(*attention, token),
                    layer=next(remaining),
                )
                for rate in rates
            )
        )


class FormixCvtPreTrainedModel(CvtPreTrainedModel):
    """Initialisation as CvT's."""

    config_class = FormixCvtConfig
    config: FormixCvtConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["FormixCvtLayer"]


class FormixCvtModel(FormixCvtPreTrainedModel, CvtModel):
    """CvT's three stages with a design's blocks: images [B, 3, H, W] -> features [B, C, H/16, W/16]."""

    def __init__(self, config: FormixCvtConfig, add_pooling_layer: bool = True) -> None:
        with _few_layers(config):
            super().__init__(config, add_pooling_layer=add_pooling_layer)
        _put_layers(self.encoder, config)
        self.post_init()


class FormixCvtForImageClassification(FormixCvtPreTrainedModel, CvtForImageClassification):
    """CvT with a classifier on the normalised class token."""

    def __init__(self, config: FormixCvtConfig) -> None:
        with _few_layers(config):
            super().__init__(config)
        _put_layers(self.cvt.encoder, config)
        self.post_init()


TASKS: dict[str, Any] = {"image-classification": FormixCvtForImageClassification, "features": FormixCvtModel}


def create_cvt(
    name: str, design: str | Design = "softmax", *, task: str = "image-classification", **config: Any
) -> Any:
    """CvT of `SIZES` with random weights; `config` holds fields of transformers' config.

    timm's words num_classes and in_chans are understood, and img_size, which CvT does not need: it takes any size.

    Raises:
        ValueError: unknown task or field, or a design that CvT cannot have.
    """
    if name not in SIZES:
        raise ValueError(f"{name!r} is no CvT; known are {', '.join(SIZES)}.")
    fields, chosen = SIZES[name] | _fields(config), find_design(design).to_dict()
    with refusals_named(name, config):
        built = FormixCvtConfig(**fields, design=chosen)
        _check_stages(built)
        model = _class_for(task)(built)
    return model if model.config.dtype is None else model.to(model.config.dtype)


def from_directory(
    directory: Path, design: str | Design | None = None, *, task: str | None = None, **config: Any
) -> Any:
    """A transformers CvT directory, or one that formix saved, with its weights, in `design`.

    Raises:
        ValueError: a field that CvT does not have, or a design with weights that the directory does not have.
    """
    given = _fields(config)
    stored = json.loads((directory / "config.json").read_text())
    own_task = task is None and not given
    heads = [name.removeprefix("Formix") for name in stored.get("architectures") or []]
    task = task or ("features" if heads == ["CvtModel"] else "image-classification")
    chosen = find_design(design if design is not None else stored.get("design") or "softmax")
    source = AutoConfig.from_pretrained(directory, local_files_only=True).to_dict()
    fields = {k: v for k, v in source.items() if k not in ("model_type", "design")}
    with refusals_named(str(directory), config):
        built = FormixCvtConfig(**(fields | given), design=chosen.to_dict())
    _check_stages(built)
    model, report = read_weights(
        _class_for(task),
        directory,
        config=built,
        ignore_mismatched_sizes=not own_task,  # the classifier of other classes; anything else is refused below
    )
    as_saved = own_task and design is None and stored["model_type"] == FormixCvtConfig.model_type
    check_loaded(model, report, directory, layers="layers", whole=as_saved, new_head=not own_task)
    return model


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the config, by timm's words too."""
    single = ("num_classes", "num_labels", "in_chans", "num_channels")  # the others are of each stage
    check_sizes({k: v for k, v in config.items() if k in single})
    words = {"num_channels" if k == "in_chans" else k: v for k, v in config.items() if k != "img_size"}
    return known_fields(FormixCvtConfig, words)


def _check_stages(config: Any) -> None:
    """Raise `ValueError` for fields that do not name every stage, and for stages without layers, channels or heads."""
    staged = (name for name, value in CvtConfig().to_dict().items() if isinstance(value, list | tuple))
    for name in staged:
        entries = getattr(config, name)
        if len(entries) != len(config.depth):
            raise ValueError(f"{name} has {len(entries)} entries and depth {len(config.depth)}; give one per stage.")
        if name in ("depth", "embed_dim", "num_heads") and min(entries, default=0) < 1:
            raise ValueError(f"{name} is {list(entries)}; it must be whole numbers, 1 or more, one per stage.")


def _class_for(task: str) -> Any:
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; CvT models do {', '.join(TASKS)}.")
    return TASKS[task]


def _register() -> None:
    """Make transformers' Auto classes know the model type; runs when this module has been imported."""
    import transformers as hf

    AutoConfig.register(FormixCvtConfig.model_type, FormixCvtConfig, exist_ok=True)
    hf.AutoModel.register(FormixCvtConfig, FormixCvtModel, exist_ok=True)
    hf.AutoModelForImageClassification.register(FormixCvtConfig, FormixCvtForImageClassification, exist_ok=True)


_register()
