"""Small random models of the real classes of every family that formix converts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers as hf
from torch import Tensor

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
DISTIL = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": 60, "max_position_embeddings": 64}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 60, "n_positions": 64}

SOURCES: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)),
    "bert-features": lambda: hf.BertModel(hf.BertConfig(**TEXT), add_pooling_layer=False),
    "bert-choices": lambda: hf.BertForMultipleChoice(hf.BertConfig(**TEXT)),
    "bert-chunks": lambda: hf.BertModel(hf.BertConfig(**TEXT, chunk_size_feed_forward=3)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT)),
    "xlm-roberta": lambda: hf.XLMRobertaForMaskedLM(hf.XLMRobertaConfig(**TEXT, pad_token_id=1)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTIL)),
    "distilbert-choices": lambda: hf.DistilBertForMultipleChoice(hf.DistilBertConfig(**DISTIL)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "llama-dynamic": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**GROUPED, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=16)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=6)),
    "llama-answers": lambda: hf.LlamaForQuestionAnswering(hf.LlamaConfig(**GROUPED)),
    "qwen2-answers": lambda: hf.Qwen2ForQuestionAnswering(hf.Qwen2Config(**GROUPED)),
    "qwen3-answers": lambda: hf.Qwen3ForQuestionAnswering(hf.Qwen3Config(**GROUPED, head_dim=16)),
    "hf-vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)),
    "hf-vit-features": lambda: hf.ViTModel(hf.ViTConfig(**IMAGE)),
    "hf-deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**IMAGE)),
    "hf-deit-distilled": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**IMAGE)),
    "hf-dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**IMAGE)),
    "hf-dinov2-registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**IMAGE)),
    "hf-dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**IMAGE, num_register_tokens=4)),
    "hf-dinov3-gated": lambda: hf.DINOv3ViTModel(
        hf.DINOv3ViTConfig(**IMAGE, use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False)
    ),
    "vit": lambda: timm.create_model(
        "vit_small_patch16_224", img_size=32, embed_dim=32, depth=3, num_heads=4, num_classes=7
    ),
    "vit-own": lambda: timm.create_model(
        "vit_small_patch16_224",
        img_size=32,
        patch_size=(8, 16),
        embed_dim=32,
        depth=3,
        num_heads=4,
        num_classes=7,
        global_pool="avg",
        pool_include_prefix=True,
        dynamic_img_size=True,
        dynamic_img_pad=True,
        proj_bias=False,
        scale_attn_norm=True,
        scale_mlp_norm=True,
        pre_norm=True,
    ),
    "vit-swiglu": lambda: timm.create_model(
        "aimv2_large_patch14_224", img_size=28, embed_dim=32, depth=3, num_heads=4, mlp_ratio=2.0, num_classes=7
    ),
    "deit-distilled": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=48, depth=2, num_classes=7
    ),
    "dinov2": lambda: timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=28, embed_dim=48, depth=2, num_heads=4
    ),
    "dinov3": lambda: timm.create_model(
        "vit_small_patch16_dinov3", img_size=32, embed_dim=48, depth=2, num_heads=4, num_classes=7
    ),
    "eva02": lambda: timm.create_model(
        "eva02_base_patch14_224", img_size=28, embed_dim=48, depth=2, num_heads=4, num_classes=7
    ),
    "rope-vit": lambda: timm.create_model(
        "vit_small_patch16_rope_mixed_224", img_size=32, embed_dim=48, depth=2, num_heads=4
    ),
    "relpos": lambda: timm.create_model(
        "vit_relpos_small_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=4, num_classes=7
    ),
    "res-post": lambda: timm.create_model(
        "vit_base_patch16_rpn_224", img_size=32, embed_dim=48, depth=2, num_heads=4, num_classes=7
    ),
    "differential": lambda: timm.create_model(
        "vit_dlittle_patch16_reg1_gap_256", img_size=32, embed_dim=48, depth=2, num_heads=4, num_classes=7
    ),
    "xcit": lambda: timm.create_model("xcit_nano_12_p16_224", img_size=32, depth=2, num_classes=7),
}

UNCOUNTED = ("bert-chunks", "llama-dynamic")  # PyTorch cannot run them on shapes alone


def make(name: str) -> Any:
    """The source in float64 and evaluation mode, with weights that make blocks matter."""
    torch.manual_seed(0)
    model = SOURCES[name]().double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(model: Any) -> dict[str, Tensor]:
    """Tokens, or images, for a source."""
    generator = torch.Generator().manual_seed(1)
    if hasattr(model, "config") and hasattr(model.config, "vocab_size"):
        shape = (2, 3, 12) if "MultipleChoice" in type(model).__name__ else (2, 12)
        return {"input_ids": torch.randint(5, 60, shape, generator=generator)}
    size = model.config.image_size if hasattr(model, "config") else model.patch_embed.img_size[0]
    return {"pixel_values": torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)}


@torch.no_grad()
def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Logits, of an answer's start and end together, or the features that a model without a head returns."""
    out = model(given["pixel_values"]) if "pixel_values" in given else model(**given)
    if isinstance(out, Tensor):
        return out
    if hasattr(out, "logits"):
        return out.logits
    if hasattr(out, "start_logits"):
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.last_hidden_state[:, 0] if "pixel_values" in given else out.last_hidden_state
