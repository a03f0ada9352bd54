"""Language modelling: windows, splits, baselines, tokenizers."""

import bz2
import gzip
import hashlib
import json
import lzma
import math
import random
import sysconfig
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from formix.data import load_data, text
from formix.data.text import load_tokenizer, tokenizer_identity

WORDS = [*"abcdefg", "the", "cat", "sat", "on", "mat", "dög", "until", "night", "town"]


def prose(lines: int) -> str:
    generator = random.Random(0)
    return "".join(" ".join(generator.choices(WORDS, k=5 + i % 7)) + "\n" for i in range(lines))


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def stream(dataset) -> list[int]:
    """The first input, then every target."""
    batch = dataset.__getitems__(range(len(dataset)))
    return [batch["input_ids"][0, 0].item(), *batch["labels"].flatten().tolist()]


@pytest.fixture(scope="module")
def stdlib():
    return load_data("stdlib", limit=200_000)


def save_tokenizer(directory: Path) -> str:
    """A small byte-level BPE, as GPT-2's, trained and saved in transformers' layout."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([prose(200)], vocab_size=280, show_progress=False, special_tokens=["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>").save_pretrained(directory)
    return str(directory)


def test_targets_follow_inputs_and_cover_the_text_once(tmp_path):
    content = prose(60).encode()
    data = load_data(f"text:{write(tmp_path / 'a.txt', content.decode())}", sequence_length=16)
    batch = data.train.__getitems__([0, 1])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert (batch["input_ids"].dtype, batch["labels"].dtype) == (torch.int64, torch.int64)
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert batch["input_ids"][1, 0] == batch["labels"][0, -1]
    position = 0
    for split in (data.train, data.validation, data.test):  # contiguous, in this order
        covered = bytes(stream(split))
        position = content.index(covered, position)
        assert len(covered) == 16 * len(split) + 1
        position += len(covered)
    assert len(content) - position < 16
    assert data.bytes_per_target == {"train": 1.0, "validation": 1.0, "test": 1.0}


def test_contiguous_parts_keep_their_fractions(tmp_path):
    name = f"text:{write(tmp_path / 'a.txt', prose(300))}"
    sizes = load_data(name, sequence_length=8, validation_fraction=0.2, test_fraction=0.3).provenance["bytes"]
    whole = sum(sizes.values())
    assert whole == len(prose(300).encode())
    assert [round(sizes[s] / whole, 2) for s in ("train", "validation", "test")] == [0.5, 0.2, 0.3]


def test_folders_and_lists_of_files_are_joined_in_order(tmp_path):
    for name in ("b.txt", "sub/c.txt", "a.txt"):
        write(tmp_path / name, prose(20) + name)
    (tmp_path / "notes.md").write_text("not text")
    parts = [prose(20) + name for name in ("a.txt", "b.txt", "sub/c.txt")]
    folder = load_data(f"text:{tmp_path}", sequence_length=4)
    assert "".join(parts).encode().startswith(bytes(stream(folder.train)))
    listed = load_data(f"text:{tmp_path / 'b.txt'},{tmp_path / 'a.txt'}", sequence_length=4)
    assert (parts[1] + parts[0]).encode().startswith(bytes(stream(listed.train)))


@pytest.mark.parametrize("with_validation", [True, False])
def test_names_of_files_say_the_splits(tmp_path, with_validation):
    write(tmp_path / "x.train.txt", "train" * 100)
    write(tmp_path / "x.test.txt", "test" * 100)
    if with_validation:
        write(tmp_path / "x.valid.txt", "valid" * 100)
    data = load_data(f"text:{tmp_path}", sequence_length=8)
    assert set(bytes(stream(data.test))) == set(b"test")
    assert set(bytes(stream(data.validation))) == set(b"valid" if with_validation else b"train")
    assert data.provenance["bytes"]["train"] == (500 if with_validation else 450)


def test_validation_without_test_is_the_test_split(tmp_path):
    write(tmp_path / "train.txt", "train" * 100)
    write(tmp_path / "valid.txt", "VALID" * 100)
    data = load_data(f"text:{tmp_path}", sequence_length=8)
    assert set(bytes(stream(data.test))) == set(b"VALID")
    assert data.provenance["bytes"] == {"train": 450, "validation": 50, "test": 500}


def test_files_beside_named_splits_are_passed_over_and_said(tmp_path, caplog):
    for name in ("train", "test", "more"):
        write(tmp_path / f"{name}.txt", name * 100)
    write(tmp_path / "train-test.txt", "BOTH" * 100)  # in both, it would be trained and tested on
    data = load_data(f"text:{tmp_path}", sequence_length=8)
    assert data.provenance["bytes"] == {"train": 450, "validation": 50, "test": 400}
    assert set(bytes(stream(data.test))) == set(b"test")
    assert f"passed over in {tmp_path}: 2 files whose names say no one split, such as" in caplog.text


def test_a_folder_may_have_the_name_of_a_text(tmp_path):
    write(tmp_path / "notes.txt" / "a.txt", prose(100))
    assert load_data(f"text:{tmp_path}", sequence_length=8).provenance["source"] == [f"{tmp_path}/notes.txt/a.txt"]


def test_a_name_of_two_splits_names_none(tmp_path):
    only = write(tmp_path / "train-test.txt", prose(400))
    data = load_data(f"text:{only}", sequence_length=8)
    assert sum(data.provenance["bytes"].values()) == only.stat().st_size


def test_wikitext(shared):
    data = load_data(f"text:{shared / 'wikitext-2'}", limit=500_000)
    original = (shared / "wikitext-2" / "wiki.test.tokens").read_bytes()
    assert original.startswith(bytes(stream(data.test)))
    assert data.provenance["bytes"]["train"] == 500_000
    assert 1 < data.baselines["byte bigram"] < data.chance < 8


def test_tiny_shakespeare(shared):
    data = load_data(f"text:{shared / 'tinyshakespeare.txt'}")
    assert sum(data.provenance["bytes"].values()) == 1_115_394
    assert data.baselines["byte bigram"] == pytest.approx(3.63, abs=0.01)


def test_stdlib_reads_whole_files_into_one_split_each(stdlib):
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = text._sources(root)
    assert not [path for path in paths if {"site-packages", "test", "tests"} & set(path.relative_to(root).parts)]
    sizes = load_data("stdlib").provenance["bytes"]
    assert sum(sizes.values()) == sum(path.stat().st_size for path in paths)
    assert 0.05 < sizes["test"] / sum(sizes.values()) < 0.2
    assert sum(stdlib.provenance["files"].values()) == len(paths)
    assert stdlib.provenance["bytes"]["train"] == 200_000
    assert (stdlib.vocab_size, stdlib.metric, stdlib.higher_is_better) == (256, "bits_per_byte", False)


def test_bigram_and_unigram_against_counting(tmp_path):
    data = load_data(f"text:{write(tmp_path / 'a.txt', prose(100))}", sequence_length=16)
    train, validation, test = (stream(split) for split in (data.train, data.validation, data.test))
    pairs, firsts, singles = Counter(pairwise(train)), Counter(train[:-1]), Counter(train[1:])

    def bigram(tokens, alpha):
        bits = 0.0
        for a, b in pairwise(tokens):
            bits -= math.log2((pairs[a, b] + alpha) / (firsts[a] + 256 * alpha))
        return bits / (len(tokens) - 1)

    def unigram(tokens, alpha):
        total = len(train) - 1
        return sum(-math.log2((singles[b] + alpha) / (total + 256 * alpha)) for b in tokens[1:]) / (len(tokens) - 1)

    for model, value in ((bigram, data.baselines["byte bigram"]), (unigram, data.chance)):
        alpha = min(text.ALPHAS, key=lambda alpha, model=model: model(validation, alpha))
        assert value == pytest.approx(model(test, alpha))


def swap_tokens(directory: str, one: int, other: int) -> None:
    """Change a saved tokenizer in place: two of its tokens exchange their ids."""
    path = Path(directory, "tokenizer.json")
    saved = json.loads(path.read_text())
    words = {index: word for word, index in saved["model"]["vocab"].items()}
    saved["model"]["vocab"] |= {words[one]: other, words[other]: one}
    path.write_text(json.dumps(saved))


def test_a_tokenizer_changed_in_place_is_other_data(tmp_path):
    name, directory = f"text:{write(tmp_path / 'a.txt', prose(300))}", save_tokenizer(tmp_path / "bpe")

    def digest(tokenizer: str | None) -> str:
        return load_data(name, sequence_length=16, tokenizer=tokenizer).provenance["sha256"]

    first = digest(directory)
    assert first == digest(save_tokenizer(tmp_path / "same"))  # wherever it is
    assert digest(None) == hashlib.sha256(Path(tmp_path / "a.txt").read_bytes()).hexdigest()
    swap_tokens(directory, 270, 271)
    assert digest(directory) not in (first, digest(None))
    used = load_tokenizer(directory)
    used("the cat sat", truncation=True, max_length=3)
    used.backend_tokenizer.enable_padding(length=3)
    assert tokenizer_identity(used) == tokenizer_identity(load_tokenizer(directory))
    special = tmp_path / "same" / "tokenizer_config.json"
    special.write_text(json.dumps(json.loads(special.read_text()) | {"mask_token": "a"}))
    assert digest(str(tmp_path / "same")) != first


def test_a_tokenizer_directory(tmp_path):
    name, directory = f"text:{write(tmp_path / 'a.txt', prose(3000))}", save_tokenizer(tmp_path / "bpe")
    data = load_data(name, sequence_length=16, tokenizer=directory)
    assert data.vocab_size == len(data.tokenizer) == 280
    assert data.baselines == {}
    tokens = stream(data.test)
    assert max(tokens) < 280
    # Bytes of the targets, by decoding them: all but the first token of the test text, up to the last whole window.
    decoded = data.tokenizer.decode(tokens).encode()
    first = data.tokenizer.decode(tokens[:1]).encode()
    assert prose(3000).encode().count(decoded) == 1
    assert data.bytes_per_target["test"] == pytest.approx((len(decoded) - len(first)) / (len(tokens) - 1))
    assert 1 < data.bytes_per_target["train"] < 8
    assert data.chance < load_data(name, sequence_length=16).chance  # whole tokens carry more than single bytes


def test_the_tokens_do_not_depend_on_how_the_text_is_chunked(tmp_path):
    content = prose(5000)  # several chunks
    data = load_data(
        f"text:{write(tmp_path / 'a.txt', content)}", sequence_length=16, tokenizer=save_tokenizer(tmp_path / "bpe")
    )
    tokens = stream(data.train)
    assert len(data.tokenizer.decode(tokens)) > 2**16
    assert data.tokenizer(content, add_special_tokens=False)["input_ids"][: len(tokens)] == tokens


def test_wrong_text_says_what_is_needed(tmp_path):
    good = write(tmp_path / "good.txt", prose(100))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe" * 5000)
    (tmp_path / "empty").mkdir()
    empty = write(tmp_path / "empty.txt", "")
    (tmp_path / "nothing").mkdir()
    bpe = save_tokenizer(tmp_path / "bpe")
    for suffix, pack in (("gz", gzip), ("bz2", bz2), ("xz", lzma)):
        (tmp_path / f"packed.{suffix}").write_bytes(pack.compress(prose(100).encode()))
        with pytest.raises(ValueError, match=rf"packed\.{suffix}' is compressed.*unpack it first"):
            load_data(f"text:{tmp_path / f'packed.{suffix}'}")
    for name, options, sentence in [
        ("absent.txt", {}, "absent.txt' does not exist; give a text file"),
        ("good.txt,absent.txt", {}, "does not exist"),
        (f"good.txt,{tmp_path / 'empty' / '..' / 'good.txt'}", {}, "good.txt' is read twice in"),
        ("empty", {}, "holds no text: a folder needs files that end in .txt, .tokens, .raw"),
        (empty.name, {}, "train part of .* has 0 tokens, and one window has 129"),
        (good.name, {"sequence_length": 2000}, "validation part of .* and one window has 2001"),
        (good.name, {"tokenizer": "bert-base"}, "tokenizer='bert-base' is no directory"),
        (good.name, {"tokenizer": str(tmp_path / "nothing")}, "could not be loaded by transformers"),
        (binary.name, {"tokenizer": bpe, "sequence_length": 8}, "is not UTF-8 text .*; a tokenizer needs that"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            load_data(f"text:{tmp_path / name}", **options)
    assert load_data(f"text:{binary}", sequence_length=8).vocab_size == 256  # bytes are bytes
