"""What 16 bits do to SimA's orders, and DeiT-style ViTs in the design `sima`."""

import pytest
import straight as s
import torch
from oracles import close

import formix
from formix.ops import l1_attention

# relative error at D = 64: order, dtype, tokens, measured with the official formula
TABLE = [
    ("qk_v", torch.float16, 197, 4.6e-4),
    ("qk_v", torch.float16, 785, 9.4e-4),
    ("qk_v", torch.float16, 3137, 1.35e-2),  # the products fall among float16's subnormal numbers
    ("q_kv", torch.float16, 197, 5e-4),
    ("q_kv", torch.float16, 785, 5e-4),
    ("q_kv", torch.float16, 3137, 5e-4),
    ("q_kv", torch.float16, 16385, 2.9e-3),
    ("fused", torch.float16, 197, 5e-4),
    ("fused", torch.float16, 785, 5e-4),
    ("fused", torch.float16, 3137, 5e-4),
    ("qk_v", torch.bfloat16, 197, 3.7e-3),
    ("qk_v", torch.bfloat16, 785, 3.7e-3),
    ("q_kv", torch.bfloat16, 197, 3.7e-3),
    ("q_kv", torch.bfloat16, 3137, 3.7e-3),
    ("fused", torch.bfloat16, 785, 3.7e-3),
    ("fused", torch.bfloat16, 3137, 3.7e-3),
]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("order", "dtype", "tokens", "expected"), TABLE, ids=lambda v: str(v).split(".")[-1])
def test_error_of_each_order(order, dtype, tokens, expected):
    q, k, v = (torch.randn(1, 1, tokens, 64) for _ in range(3))
    exact = s.sima(q.double(), k.double(), v.double())
    out = l1_attention(q.to(dtype), k.to(dtype), v.to(dtype), order=order, impl="reference")
    assert relative_error(out, exact) == pytest.approx(expected, rel=0.25)


def test_fused_order_is_as_good_as_its_output_format():
    """At 16,385 tokens the output itself, near 6e-6, is subnormal in float16; nothing else is lost on the way."""
    q, k, v = (torch.randn(1, 1, 16385, 64) for _ in range(3))
    exact = s.sima(q.double(), k.double(), v.double())
    out = l1_attention(q.half(), k.half(), v.half(), order="fused", impl="reference")
    assert relative_error(out, exact) < 1.1 * relative_error(exact.half(), exact)
    in_float32 = l1_attention(q.half().float(), k.half().float(), v.half().float(), order="fused", impl="reference")
    assert relative_error(in_float32, exact) < 5e-4


def test_orders_agree_in_float32_and_magnitudes_fall_with_length():
    for tokens, std in ((196, 4.6e-3), (784, 5.8e-4)):
        q, k, v = (torch.randn(8, 6, tokens, 64) for _ in range(3))
        outs = [l1_attention(q, k, v, order=o, impl="reference") for o in ("qk_v", "q_kv", "fused")]
        assert outs[0].std().item() == pytest.approx(std, rel=0.03)
        for other in outs[1:]:
            close(other, outs[0], 2e-6)


def vit(state: s.State, images: torch.Tensor, *, heads: int, patch: int, depth: int) -> torch.Tensor:
    """A DeiT with SimA: the class token counts in the norms, no scale, no softmax."""
    x = s.conv(state, "patch_embed.proj", images, stride=patch).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    for i in range(depth):
        p = f"blocks.{i}"
        qkv = s.linear(state, f"{p}.attn.qkv", s.norm(state, f"{p}.norm1", x, 1e-6)).chunk(3, dim=-1)
        mixed = s.merge_heads(s.sima(*(s.split_heads(part, heads) for part in qkv)))
        x = x + s.linear(state, f"{p}.attn.proj", mixed)
        hidden = s.gelu(s.linear(state, f"{p}.mlp.fc1", s.norm(state, f"{p}.norm2", x, 1e-6)))
        x = x + s.linear(state, f"{p}.mlp.fc2", hidden)
    return s.linear(state, "head", s.norm(state, "norm", x, 1e-6)[:, 0])


@pytest.mark.parametrize(
    ("name", "size", "design", "heads"),
    [
        ("deit_tiny_patch16_224", 64, "sima", 3),  # 17 tokens, 64 channels: (Q K^T) V
        ("vit_tiny_patch16_224", 144, "sima", 3),  # 82 tokens: Q (K^T V)
        ("deit_tiny_patch16_224", 64, "sima(num_heads=1)", 1),
    ],
)
def test_deit_with_sima(name, size, design, heads):
    model = formix.create_model(name, design=design, depth=2, img_size=size, num_classes=4)
    state = s.random_state({k: tuple(v.shape) for k, v in model.state_dict().items()})
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    s.compare(model, lambda w, x: vit(w, x, heads=heads, patch=16, depth=2), state, images)
