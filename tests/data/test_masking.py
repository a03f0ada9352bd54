import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from formix.data import load_data
from formix.data.glue import train_wordpiece
from formix.data.masking import BYTE_MASK, masked_lm

TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 400


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(TEXT)
    return load_data(f"text:{path}", sequence_length=32)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    root = tmp_path_factory.mktemp("words")
    (root / "a.txt").write_text(TEXT)
    train_wordpiece([TEXT]).save_pretrained(root / "tokenizer")
    return load_data(f"text:{root / 'a.txt'}", sequence_length=32, tokenizer=str(root / "tokenizer"))


def shares(inputs, labels, mask):
    """Of all tokens: chosen; of the chosen: masked, another token, unchanged."""
    chosen = labels >= 0
    masked, same = chosen & (inputs == mask), chosen & (inputs == labels)
    count = chosen.sum()
    return [
        chosen.float().mean(),
        masked.sum() / count,
        (count - masked.sum() - same.sum()) / count,
        same.sum() / count,
    ]


def test_the_shares_are_berts_and_those_of_transformers(words):
    data = masked_lm(words, seed=3)
    batch = data.train.__getitems__([i + d * len(data.train) for d in range(20) for i in range(len(data.train))])
    ours = shares(batch["input_ids"][:, 1:-1], batch["labels"][:, 1:-1], words.tokenizer.mask_token_id)
    collator = DataCollatorForLanguageModeling(words.tokenizer, seed=0)
    collator.create_rng()
    plain = data.train.windows.long().repeat(20, 1)
    inputs, labels = collator.torch_mask_tokens(plain.clone(), torch.zeros_like(plain))
    theirs = shares(inputs, labels, words.tokenizer.mask_token_id)
    for our, their, paper in zip(ours, theirs, (0.15, 0.8, 0.1, 0.1), strict=True):
        assert our == pytest.approx(paper, abs=0.02)
        assert our == pytest.approx(float(their), abs=0.03)


def test_labels_are_the_tokens_and_special_tokens_are_around_and_never_predicted(words):
    data = masked_lm(words)
    batch = data.train.__getitems__([0, 1, 2])
    assert batch["input_ids"].shape == (3, 32)
    assert (batch["input_ids"][:, 0] == words.tokenizer.cls_token_id).all()
    assert (batch["input_ids"][:, -1] == words.tokenizer.sep_token_id).all()
    inner, chosen = batch["labels"][:, 1:-1], batch["labels"][:, 1:-1] >= 0
    assert torch.equal(inner[chosen], data.train.windows[:3].long()[chosen])
    assert torch.equal(batch["input_ids"][:, 1:-1][~chosen], data.train.windows[:3].long()[~chosen])
    assert (batch["labels"][:, [0, -1]] == -100).all()
    assert data.vocab_size == words.vocab_size


def test_bytes_have_a_mask_beside_the_256(text):
    data = masked_lm(text)
    batch = data.train.__getitems__(range(8))
    assert (batch["input_ids"] == BYTE_MASK).any()
    assert data.vocab_size == 258
    assert (data.metric, data.task, data.higher_is_better) == ("perplexity", "masked-lm", False)
    assert 1 < data.chance < 256
    assert torch.equal(data.train.windows.flatten(), text.train.tokens[: data.train.windows.numel()])


def test_training_is_masked_anew_at_every_draw_and_evaluation_is_not(text):
    data, size = masked_lm(text, seed=1), len(masked_lm(text).train)
    assert torch.equal(data.train[0]["labels"], data.train.__getitems__([5, 0])["labels"][1])
    assert not torch.equal(data.train[0]["labels"], data.train.__getitems__([size])["labels"][0])
    assert not torch.equal(data.train[0]["labels"], masked_lm(text, seed=2).train[0]["labels"])
    assert torch.equal(data.test[0]["labels"], masked_lm(text, seed=2).test[0]["labels"])


@pytest.mark.parametrize(("probability", "count"), [(1e-6, 1), (0.15, 5), (0.5, 16)])
def test_every_window_has_as_many_tokens_to_predict(text, probability, count):
    labels = masked_lm(text, probability=probability).train.__getitems__(range(20))["labels"]
    assert ((labels >= 0).sum(1) == count).all()
    assert (labels >= 0).any(0).sum() > count  # in other places in every window


def test_what_cannot_be_masked_is_refused(text, words):
    with pytest.raises(ValueError, match="image-classification"):
        masked_lm(load_data("digits", limit=64))
    with pytest.raises(ValueError, match="mask_probability is 1"):
        masked_lm(text, probability=1.0)
    words.tokenizer.mask_token, kept = None, words.tokenizer.mask_token
    try:
        with pytest.raises(ValueError, match="no mask token"):
            masked_lm(words)
    finally:
        words.tokenizer.mask_token = kept
