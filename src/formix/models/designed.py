"""What timm's Vision Transformers in a design have in common: their description on disk and timm's checkpoints."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from formix.design import Design
from formix.models.image import about_classes


class Designed:
    """A trunk of timm's, built by its name and arguments, whose blocks are in a `Design`."""

    design: Design
    base: str  # timm's name of the trunk
    arguments: dict[str, Any]  # what it was created with
    fc_norm_argument = "fc_norm"  # timm's word for the norm between pooling and classifier

    def saved_config(self: Any) -> dict[str, Any]:
        """What config.json says of the model, in timm's own format; the architecture is formix's, so that no loader can
        mistake it for the softmax model."""
        arguments = {
            **self.arguments,
            "num_classes": self.num_classes,
            "global_pool": self.global_pool,
            "in_chans": self.in_chans,
            "img_size": list(self.patch_embed.img_size),
        }
        if not isinstance(self.norm, nn.Identity) or not isinstance(self.fc_norm, nn.Identity):
            arguments[self.fc_norm_argument] = not isinstance(self.fc_norm, nn.Identity)
        cfg = dict(self.pretrained_cfg)
        kept = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "first_conv", "classifier")
        pretrained_cfg = {k: cfg[k] for k in kept if k in cfg}
        if not getattr(self, "dynamic_img_size", False):  # else it may take images of another size than its positions'
            pretrained_cfg["input_size"] = [self.in_chans, *self.patch_embed.img_size]
        return {
            "architecture": "formix_vit",
            "num_classes": self.num_classes,
            **about_classes(dict(self.pretrained_cfg)),
            "num_features": self.num_features,
            "global_pool": self.global_pool,
            "model_args": {"base": self.base, "design": self.design.to_dict(), **arguments},
            "pretrained_cfg": pretrained_cfg,
        }

    def adapt_checkpoint(self: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights as timm reads them: other layouts, position embeddings of another image size."""
        return checkpoint_filter_fn(state, self, antialias=getattr(self, "pos_antialias", True))
