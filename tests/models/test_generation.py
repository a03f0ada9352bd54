"""Cached generation gives the tokens and logits of full forward passes, for every design a decoder can have."""

from __future__ import annotations

import pytest
import torch
from text_families import DECODERS, small, tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

import formix
from formix.models.kv_heads import prune_kv_heads

DESIGNS = {
    "softmax": formix.design("softmax"),
    "relu": formix.design("relu"),
    "relu2-half": formix.design("relu(activation=relu2,length_exponent=0.5)"),
    "sigmoid-bias": formix.design("relu(activation=sigmoid_bias)"),
    "skip": formix.design("skip"),
    "skip-far": formix.design("skip(source=distance(2),heads=1)"),
    "relu+paf+skip": formix.design("relu+paf+skip"),
    "parallel": formix.design("parallel"),
    "qk-norm-gate": formix.design("relu(qk_norm=true,gate=silu)"),
    "hybrid": formix.design("relu", layers={0: formix.design("softmax").mixer}),
    "activator-first": formix.design("softmax", layers={0: formix.design("activator").mixer}),
    "activator-later": formix.design("relu", layers={2: formix.design("activator").mixer}),
}
both = pytest.mark.parametrize("family", DECODERS)
every = pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)


def left_padded(short: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of a full row and one with `short` tokens behind padding: ids, mask, positions."""
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
    ids[1, : length - short], mask[1, : length - short] = 1, 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def greedy_by_full_forward(model, ids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    logits = []
    for _ in range(steps):
        logits.append(model(ids, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return ids, torch.stack(logits)


def generate(model, ids: Tensor, **options):
    model.generation_config.eos_token_id = None
    return model.generate(
        ids, max_new_tokens=6, pad_token_id=1, return_dict_in_generate=True, output_logits=True, **options
    )


def assert_same_logits(result, expected: Tensor, row: int | None = None) -> None:
    """`generate` returns logits in float32, whatever the model computes in."""
    given = torch.stack(result.logits)  # [steps, B, vocabulary]
    given = given if row is None else given[:, row : row + 1]
    torch.testing.assert_close(given, expected.float(), rtol=1e-6, atol=1e-6)


@both
@every
@torch.no_grad()
def test_greedy_equals_full_forward(family: str, design: formix.Design) -> None:
    model, ids = small(family, design).double(), tokens(2, 7)
    expected, logits = greedy_by_full_forward(model, ids, 6)
    for cache in ("dynamic", "static"):
        result = generate(model, ids, do_sample=False, cache_implementation=cache)
        assert torch.equal(result.sequences, expected)
        assert_same_logits(result, logits)


@pytest.mark.parametrize("design", ["relu", "relu+paf+skip"])
@torch.no_grad()
def test_the_first_layers_draft_for_all_of_them(design: str) -> None:
    """Llama's self-speculation, `assistant_early_exit`; transformers' GPT-2 has none."""
    model, ids = small("llama", design).double(), tokens(1, 7)
    expected, logits = greedy_by_full_forward(model, ids, 6)
    result = generate(model, ids, do_sample=False, assistant_early_exit=2)
    assert torch.equal(result.sequences, expected)
    assert_same_logits(result, logits)


@both
@every
@torch.no_grad()
def test_left_padded_rows_equal_their_own_generation(family: str, design: formix.Design) -> None:
    model = small(family, design).double()
    ids, mask, _ = left_padded(short=4, length=9)
    for cache in ("dynamic", "static"):
        batch = generate(model, ids, attention_mask=mask, do_sample=False, cache_implementation=cache)
        for row, start in ((0, 0), (1, 5)):
            alone, logits = greedy_by_full_forward(model, ids[row : row + 1, start:], 6)
            assert torch.equal(batch.sequences[row : row + 1, start:], alone)
            assert_same_logits(batch, logits, row)


@both
@pytest.mark.parametrize("design", ["softmax", "relu", "skip", "relu+paf+skip"])
@torch.no_grad()
def test_sampling_and_beams_do_not_depend_on_the_cache(family: str, design: str) -> None:
    model = small(family, design).double()
    ids, mask, _ = left_padded(short=4, length=9)
    for options in ({"do_sample": True, "top_k": 20}, {"do_sample": False, "num_beams": 3}):
        runs = []
        for cache in ({"use_cache": False}, {"cache_implementation": "dynamic"}, {"cache_implementation": "static"}):
            torch.manual_seed(3)
            runs.append(generate(model, ids, attention_mask=mask, **options, **cache).sequences)
        assert torch.equal(runs[0], runs[1])
        assert torch.equal(runs[0], runs[2])


@both
@pytest.mark.parametrize("design", ["softmax", "relu", "skip", "relu+parallel+skip"])
@torch.no_grad()
def test_tokens_in_pieces_equal_tokens_at_once(family: str, design: str) -> None:
    model, ids = small(family, design).double(), tokens(2, 12)
    full = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([5, 1, 4, 2], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=1e-10)


@both
def test_either_name_of_the_cache(family: str) -> None:
    """transformers calls it `past_key_values` before 5.24 and `cache` since; its heads hand on their own name alone."""
    trunk, ids = small(family, formix.design("relu")).double().base_model, tokens(2, 6)
    expected = trunk(ids, use_cache=False).last_hidden_state[:, -2:]
    for name in ("past_key_values", "cache"):
        given = DynamicCache()
        trunk(ids[:, :4], use_cache=True, **{name: given})
        rest = trunk(ids[:, 4:], use_cache=True, **{name: given})
        torch.testing.assert_close(rest.last_hidden_state, expected)
        assert rest.past_key_values is given
    with pytest.raises(ValueError, match="as past_key_values or as cache, not as both"):
        trunk(ids, past_key_values=given, cache=given)


@both
@every
@torch.no_grad()
def test_padding_left_right_and_none_agree(family: str, design: formix.Design) -> None:
    model, ids = small(family, design).double(), tokens(1, 5)
    alone = model(ids).logits[0]
    pads, seen, unseen = tokens(1, 3), torch.ones(1, 5), torch.zeros(1, 3)
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
    left = model(
        torch.cat([pads, ids], 1), attention_mask=torch.cat([unseen, seen], 1).long(), position_ids=positions
    ).logits[0]
    right = model(torch.cat([ids, pads], 1), attention_mask=torch.cat([seen, unseen], 1).long()).logits[0]
    torch.testing.assert_close(left[3:], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(right[:5], alone, rtol=0, atol=1e-10)
    assert left.isfinite().all()  # the rows of padding, which see no key at all


@both
@every
@torch.no_grad()
def test_no_token_sees_a_later_one(family: str, design: formix.Design) -> None:
    model, ids = small(family, design).double(), tokens(1, 10)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] - 4) % 50 + 5
    before, after = model(ids).logits[0], model(changed).logits[0]
    assert torch.equal(before[:6], after[:6])
    assert (before[6:] - after[6:]).abs().amax(-1).min() > 1e-6


@both
@torch.no_grad()
def test_left_padding_is_not_dropped_silently(family: str) -> None:
    model = small(family, "relu")
    ids, mask, positions = left_padded(short=4, length=9)
    masked = model(ids, attention_mask=mask, position_ids=positions).logits
    assert not torch.allclose(masked[1, -1], model(ids, position_ids=positions).logits[1, -1])


@both
@torch.no_grad()
def test_a_pruned_model_generates_the_same_with_a_smaller_cache(family: str) -> None:
    model = small(family, "relu+skip(source=fixed(0),heads=1.0)").double()
    ids, mask, _ = left_padded(short=4, length=9)
    before = generate(model, ids, attention_mask=mask, do_sample=False)
    assert prune_kv_heads(model) > 0
    for cache in ("dynamic", "static"):
        after = generate(model, ids, attention_mask=mask, do_sample=False, cache_implementation=cache)
        assert torch.equal(before.sequences, after.sequences)
        assert_same_logits(after, torch.stack(before.logits))
    kept = [0 if layer.keys is None else layer.keys.numel() for layer in after.past_key_values.layers]
    assert kept[0] > 0
    assert kept[1:] == [0, 0, 0]


@both
@torch.no_grad()
def test_a_beam_of_a_pruned_model(family: str) -> None:
    model, ids = small(family, "skip").double(), tokens(2, 6)
    before = generate(model, ids, num_beams=3, do_sample=False).sequences
    prune_kv_heads(model)
    assert torch.equal(before, generate(model, ids, num_beams=3, do_sample=False).sequences)


def test_designs_that_a_decoder_cannot_have_are_refused() -> None:
    for family in DECODERS:
        for design, reason in (("sima", "future"), ("activator", "mixes no tokens"), ("relu(length=keys)", "cache")):
            with pytest.raises(ValueError, match=reason):
                small(family, design)
