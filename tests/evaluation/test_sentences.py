"""Sentence embeddings and their correlation with human scores."""

import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModel

import formix
from formix.data.byte_tokenizer import byte_tokenizer
from formix.data.glue import train_wordpiece
from formix.evaluation import sentence_embeddings, sts_spearman

SENTENCES = ["a cat sits", "the dog runs in a park", "a cat is sitting", "stocks fell", "dogs run", "the market fell"]
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(SENTENCES)


def bert(tokenizer, design="softmax", task="features"):
    return formix.create_model("bert-tiny", design=design, task=task, vocab_size=len(tokenizer), **SMALL).eval()


def test_an_embedding_is_the_unit_mean_of_its_tokens(tokenizer):
    model = bert(tokenizer, "relu")
    together = sentence_embeddings(model, tokenizer, SENTENCES, batch_size=4)
    assert together.shape == (6, 32)
    for sentence, embedding in zip(SENTENCES, together, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].mean(0)  # no padding at all
        torch.testing.assert_close(embedding, mean / mean.norm(), atol=1e-5, rtol=1e-4)


def test_stock_and_formix_models_with_any_head_agree(tokenizer, tmp_path):
    headed = bert(tokenizer, task="masked-lm").train()
    formix.save(headed, tmp_path)
    trunk = AutoModel.from_pretrained(tmp_path, local_files_only=True)
    torch.testing.assert_close(
        sentence_embeddings(headed, tokenizer, SENTENCES), sentence_embeddings(trunk, tokenizer, SENTENCES)
    )
    assert headed.training


def test_sentences_are_cut_to_the_models_positions(tokenizer):
    model = formix.create_model(
        "bert-tiny", task="features", vocab_size=len(tokenizer), max_position_embeddings=8, **SMALL
    )
    whole = " ".join(SENTENCES)
    eight = sentence_embeddings(model, tokenizer, [whole], max_length=8)
    assert torch.equal(sentence_embeddings(model, tokenizer, [whole]), eight)


def test_a_sentence_without_tokens_is_refused_and_no_sentences_have_no_embeddings():
    model = formix.create_model("bert-tiny", task="features", vocab_size=258, **SMALL)
    with pytest.raises(ValueError, match="'' has no tokens, and so no embedding; leave it out"):
        sentence_embeddings(model, byte_tokenizer(masked=True), ["abc", ""])
    assert sentence_embeddings(model, byte_tokenizer(masked=True), []).shape == (0, 32)


def test_spearman_of_a_file(tokenizer, tmp_path):
    scores = [4.5, 0.5, 3.0]
    rows = [("a cat sits", "a cat is sitting"), ("stocks fell", "dogs run"), ("the market fell", "stocks fell")]
    lines = ["sentence1\tsentence2\tscore", *(f"{a}\t{b}\t{s}" for (a, b), s in zip(rows, scores, strict=True))]
    (tmp_path / "dev.tsv").write_text("\n".join(lines) + "\n")
    model = bert(tokenizer)
    first, second = (sentence_embeddings(model, tokenizer, column) for column in zip(*rows, strict=True))
    expected = spearmanr((first * second).sum(1), scores).statistic
    assert sts_spearman(model, tokenizer, tmp_path / "dev.tsv") == pytest.approx(expected)
    with pytest.raises(ValueError, match="does not exist"):
        sts_spearman(model, tokenizer, tmp_path / "absent.tsv")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tokenizer):
    tokens = len(tokenizer)
    model = formix.create_model("bert-tiny", task="features", vocab_size=tokens - 1, **SMALL)
    with pytest.raises(ValueError, match=f"has {tokens} tokens and this FormixBertModel knows {tokens - 1}"):
        sentence_embeddings(model, tokenizer, SENTENCES)
