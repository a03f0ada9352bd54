"""Llama-family decoders: transformers' keys, shapes and logits, and a straight-line implementation in float64."""

from __future__ import annotations

import pytest
import torch
from text_families import small, tokens
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForQuestionAnswering

import formix

CONFIG = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def test_keys_and_shapes_are_those_of_llama() -> None:
    expected = {"model.embed_tokens.weight": (60, 32), "model.norm.weight": (32,), "lm_head.weight": (60, 32)}
    for i in range(3):
        expected |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (32, 32),
            f"model.layers.{i}.self_attn.k_proj.weight": (16, 32),
            f"model.layers.{i}.self_attn.v_proj.weight": (16, 32),
            f"model.layers.{i}.self_attn.o_proj.weight": (32, 32),
            f"model.layers.{i}.mlp.gate_proj.weight": (48, 32),
            f"model.layers.{i}.mlp.up_proj.weight": (48, 32),
            f"model.layers.{i}.mlp.down_proj.weight": (32, 48),
            f"model.layers.{i}.input_layernorm.weight": (32,),
            f"model.layers.{i}.post_attention_layernorm.weight": (32,),
        }
    model = small("llama", "relu+skip", num_hidden_layers=3)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected


def test_published_sizes_have_their_parameter_counts() -> None:
    for name, count in (("llama-1.1b", 1_100_048_384), ("llama-2-7b", 6_738_415_616)):
        with torch.device("meta"):
            model = formix.create_model(name, design="relu+skip")
        assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"head_dim": 16},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    ],
    ids=lambda more: "-".join(more) or "plain",
)
def test_softmax_is_transformers_llama(more: dict) -> None:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**CONFIG, initializer_range=0.2, **more)).eval()
    ours = formix.create_model("llama-nano", **CONFIG, **more).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for options in ({}, {"attention_mask": mask, "position_ids": positions}):
        a, b = theirs(ids, labels=ids, **options), ours(ids, labels=ids, **options)
        seen = mask.bool() if options else torch.ones_like(mask).bool()
        torch.testing.assert_close(b.logits[seen], a.logits[seen], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b.loss, a.loss)


def test_a_llama_directory_is_carried_into_another_design(tmp_path) -> None:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    theirs.save_pretrained(tmp_path)
    ids = tokens(2, 9)
    same = formix.create_model(tmp_path, design="softmax").eval()
    torch.testing.assert_close(same(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    other = formix.create_model(tmp_path, design="relu+skip").eval()
    assert torch.equal(other.model.layers[1].self_attn.k_proj.weight, theirs.model.layers[1].self_attn.k_proj.weight)
    assert not torch.allclose(other(ids).logits, theirs(ids).logits, atol=1e-3)


def test_a_llama_directory_for_questions_is_read(tmp_path) -> None:
    """transformers' class calls its trunk `transformer` in the file, all others `model`."""
    theirs = LlamaForQuestionAnswering(LlamaConfig(**CONFIG)).eval()
    theirs.save_pretrained(tmp_path)
    ours = formix.create_model(tmp_path, design="softmax").eval()
    torch.testing.assert_close(ours(tokens(2, 9)).end_logits, theirs(tokens(2, 9)).end_logits, rtol=1e-5, atol=1e-6)


def test_a_model_cast_to_16_bits_is_the_one_in_its_file(tmp_path) -> None:
    """The frequencies of the rotation are not stored: they stay in float32, also through a device without memory."""
    model, ids = formix.create_model("llama-nano", **CONFIG).eval().bfloat16(), tokens(1, 60)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    formix.save(model, tmp_path)
    assert torch.equal(formix.load(tmp_path)(ids).logits, model(ids).logits)
    assert model.to("meta").to_empty(device="cpu").model.rotary_emb.inv_freq.device.type == "cpu"


# ------------------------------------------------------------------------------- the model once more, straight-line


def rotate(x: Tensor, theta: float = 10000.0) -> Tensor:
    """RoPE on one head [N, D], the pairs (x_j, x_{j + D/2}); angles in float32, as transformers computes them."""
    n, d = x.shape
    frequency = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    angle = torch.arange(n, dtype=torch.float32)[:, None] * frequency[None, :]  # [N, D/2]
    cos, sin = angle.cos().double(), angle.sin().double()
    a, b = x[:, : d // 2], x[:, d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)


def rms(x: Tensor, w: Tensor) -> Tensor:
    return w * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def llama(p: dict[str, Tensor], ids: Tensor, weights, *, heads: int, kv_heads: int, depth: int, skip, parallel: bool):
    """Logits [N, V] of one sequence; `weights(scores)` are a row's attention weights over the keys it may see;
    skip[l] = (source, set of key/value heads)."""
    x = p["model.embed_tokens.weight"][ids]  # [N, C]
    n, c = x.shape
    d = c // heads
    keys: list[list[Tensor]] = []
    values: list[list[Tensor]] = []
    for i in range(depth):
        w = {k.removeprefix(f"model.layers.{i}."): v for k, v in p.items() if f".{i}." in k}
        h = rms(x, w["input_layernorm.weight"])
        q, k, v = (h @ w[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        keys.append([rotate(k[:, j * d : (j + 1) * d]) for j in range(kv_heads)])
        values.append([v[:, j * d : (j + 1) * d] for j in range(kv_heads)])
        out = []
        for j in range(heads):
            group = j // (heads // kv_heads)
            layer = skip[i][0] if group in skip[i][1] else i
            query, key, value = rotate(q[:, j * d : (j + 1) * d]), keys[layer][group], values[layer][group]
            rows = [weights(query[t] @ key[: t + 1].T / d**0.5) @ value[: t + 1] for t in range(n)]
            out.append(torch.stack(rows))
        attention = torch.cat(out, dim=1) @ w["self_attn.o_proj.weight"].T

        def ffn(y: Tensor, w=w) -> Tensor:
            gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
            return (gate * torch.sigmoid(gate) * up) @ w["mlp.down_proj.weight"].T

        if parallel:
            x = x + attention + ffn(h)
        else:
            x = x + attention
            x = x + ffn(rms(x, w["post_attention_layernorm.weight"]))
    return rms(x, p["model.norm.weight"]) @ p["lm_head.weight"].T


SOFTMAX = ("softmax", lambda s: torch.softmax(s, -1))
RELU = ("relu", lambda s: s.clamp(min=0) / len(s))
PLAIN = [(None, set())] * 4
ONE_BELOW = [(None, set()), (0, {0}), (1, {0}), (2, {0})]  # skip's default: 3/4 of 2 heads is 1 head


@pytest.mark.parametrize(
    ("design", "weights", "skip", "parallel"),
    [
        ("softmax", SOFTMAX[1], PLAIN, False),
        ("relu", RELU[1], PLAIN, False),
        ("skip", SOFTMAX[1], ONE_BELOW, False),
        ("relu+skip(source=0_1_0_1,heads=[1])", RELU[1], [*PLAIN[:2], (0, {1}), (1, {1})], False),
        ("relu+parallel+skip(source=fixed(0),heads=2)", RELU[1], [PLAIN[0], *[(0, {0, 1})] * 3], True),
    ],
)
def test_logits_and_gradients_equal_the_straight_line_implementation(design, weights, skip, parallel) -> None:
    model = small("llama", design).double()
    ids = tokens(1, 9)
    given = model(ids).logits[0]
    parameters = dict(model.named_parameters())
    expected = llama(parameters, ids[0], weights, heads=4, kv_heads=2, depth=4, skip=skip, parallel=parallel)
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)

    direction = torch.randn(given.shape, dtype=given.dtype, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((given * direction).sum(), list(parameters.values()), allow_unused=True)
    theirs = torch.autograd.grad((expected * direction).sum(), list(parameters.values()), allow_unused=True)
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        a, b = (torch.zeros_like(parameters[name]) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
