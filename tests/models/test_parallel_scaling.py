"""timm's parallel block and formix's: the same function and the same weights, both ways."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from timm.layers import RmsNorm
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

import formix
from formix.layers import Block
from formix.models.parallel_scaling import export_state, from_parallel_scaling, import_state, to_parallel_scaling

VARIANTS = {
    "plain": {},
    "qkv-bias": {"qkv_bias": True},
    "no-biases": {"proj_bias": False},
    "qkv-bias-only": {"qkv_bias": True, "proj_bias": False},
    "qk-norm": {"qk_norm": True, "norm_layer": RmsNorm},
    "layer-scale": {"init_values": 0.1, "qkv_bias": True},
    "wide": {"mlp_ratio": 2.5, "act_layer": partial(nn.GELU, approximate="tanh")},
    "eps": {"norm_layer": partial(nn.LayerNorm, eps=0.1), "qk_norm": True},
}
variant_ = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
fused_ = pytest.mark.parametrize("fused", [False, True], ids=["two-out", "one-out"])


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


@variant_
@fused_
def test_import_and_export(variant: dict, fused: bool) -> None:
    theirs = randomised(ParallelScalingBlock(16, 4, fuse_out_proj=fused, **variant))
    x, mask = torch.randn(2, 7, 16, dtype=torch.float64), torch.rand(2, 1, 1, 7) > 0.3
    mask[..., 0] = True
    ours = from_parallel_scaling(theirs)
    for options in ({}, {"attn_mask": mask}, {"is_causal": True}):
        torch.testing.assert_close(ours(x, **options), theirs(x, **options), rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # the joined projections of evaluation
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    for other in (fused, not fused):
        back = to_parallel_scaling(ours, fuse_out_proj=other)
        torch.testing.assert_close(back(x), theirs(x), rtol=1e-10, atol=1e-10)
        if other == fused:
            assert {k: v.shape for k, v in back.state_dict().items()} == {
                k: v.shape for k, v in theirs.state_dict().items()
            }
            assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in back.state_dict().items())


def test_gradients_agree() -> None:
    theirs = randomised(ParallelScalingBlock(16, 4, qkv_bias=True)).train()
    ours, x = from_parallel_scaling(theirs).train(), torch.randn(2, 7, 16, dtype=torch.float64)
    for block in (theirs, ours):
        block(x).square().sum().backward()
    given = {k: p.grad for k, p in ours.named_parameters()}
    expected = import_state({k: p.grad for k, p in theirs.named_parameters()})
    assert given.keys() == expected.keys()
    for name, gradient in given.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10)


def test_a_whole_vision_transformer() -> None:
    fields = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
    fields |= {"pre_norm": True, "final_norm": True, "norm_layer": RmsNorm, "qkv_bias": False, "qk_norm": True}
    theirs = randomised(timm.create_model("vit_tiny_patch16_224", block_fn=ParallelScalingBlock, **fields)).float()
    ours = formix.create_model("vit_tiny_patch16_224", design="parallel", **fields).eval()
    ours.load_state_dict(import_state(theirs.state_dict()), strict=False)
    result = ours.load_state_dict(import_state(theirs.state_dict()), strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-3, atol=1e-3)
    back = export_state(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in back.items())


def test_another_mixer_takes_the_weights() -> None:
    theirs = ParallelScalingBlock(16, 4)
    ours = from_parallel_scaling(theirs, "relu+parallel")
    assert torch.equal(ours.mlp.fc1.weight, theirs.in_proj.weight[:64])
    assert ours.attn.mixer.kind == "pointwise"


@pytest.mark.parametrize(
    "block",
    [
        partial(Block, 16, 4, design="relu+parallel"),
        partial(Block, 16, 4, design="softmax"),
        partial(Block, 16, 4, design="paf"),
        partial(Block, 16, 4, design="parallel", scale_mlp_norm=True),
        partial(Block, 16, 4, design="parallel", proj_bias=False),
    ],
)
def test_what_timms_block_cannot_hold_is_refused(block) -> None:
    with pytest.raises(ValueError, match="ParallelScalingBlock"):
        to_parallel_scaling(block())


def test_two_layer_scales_and_other_layouts_are_refused() -> None:
    block = Block(16, 4, design="parallel", init_values=0.1)
    nn.init.ones_(block.ls2.gamma)
    with pytest.raises(ValueError, match="ls1 and ls2 differ"):
        to_parallel_scaling(block)
    for design in ("softmax", "paf"):
        with pytest.raises(ValueError, match="parallel"):
            from_parallel_scaling(ParallelScalingBlock(16, 4), design)
