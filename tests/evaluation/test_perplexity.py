"""Perplexity of a language model."""

import pytest
import torch
import torch.nn.functional as F

import formix
from formix.data import load_data
from formix.evaluation import perplexity


def test_perplexity_is_the_exponential_of_the_mean_loss():
    data = load_data("stdlib", limit=20000, sequence_length=32, validation_fraction=0.002, test_fraction=0.002)
    model = formix.create_model("gpt2-nano", design="relu", vocab_size=256, n_layer=1, n_embd=16, n_head=2).eval()
    rows = [data.test[i] for i in range(len(data.test))]
    ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        loss = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten())
    assert perplexity(model, data) == pytest.approx(loss.exp().item(), rel=1e-5)


def test_a_model_that_is_wrong_beyond_all_numbers_has_a_large_perplexity():
    data = load_data("stdlib", limit=20000, sequence_length=32, validation_fraction=0.002, test_fraction=0.002)
    model = formix.create_model("gpt2-nano", vocab_size=256, n_layer=1, n_embd=16, n_head=2).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1e5)
    assert perplexity(model, data) > 1e300


def test_other_data_are_refused():
    with pytest.raises(ValueError, match="needs text"):
        perplexity(torch.nn.Linear(1, 1), load_data("digits"))


def test_text_in_more_tokens_or_longer_windows_than_the_model_s_is_refused():
    data = load_data("stdlib", limit=20000, sequence_length=32, validation_fraction=0.002, test_fraction=0.002)
    model = formix.create_model("gpt2-nano", vocab_size=200, n_layer=1, n_embd=16, n_head=2)
    with pytest.raises(ValueError, match="The model knows 200 tokens and 'stdlib' has 256"):
        perplexity(model, data)
    short = formix.create_model("gpt2-nano", vocab_size=256, n_positions=16, n_layer=1, n_embd=16, n_head=2)
    with pytest.raises(ValueError, match="sequence_length is 32; this FormixGPT2LMHeadModel has 16 positions"):
        perplexity(short, data)
