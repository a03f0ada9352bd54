"""GLUE's TSV layout."""

import hashlib
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertTokenizer

from formix.data import collate, load_data
from formix.data.glue import train_wordpiece

COUNTS = {"CoLA": (8551, 1043), "SST-2": (67349, 872), "RTE": (2490, 277), "STS-B": (5749, 1500)}
METRICS = {"CoLA": "matthews_corrcoef", "SST-2": "accuracy", "RTE": "accuracy", "STS-B": "spearman"}


def write_task(root, task: str, train: str, dev: str):
    (root / task).mkdir(parents=True)
    (root / task / "train.tsv").write_text(train, encoding="utf-8")
    (root / task / "dev.tsv").write_text(dev, encoding="utf-8")
    return f"glue:{root / task}"


def sst2(rows: int) -> str:
    return "sentence\tlabel\n" + "".join(f"film {i} is {'good' if i % 2 else 'bad'}\t{i % 2}\n" for i in range(rows))


@pytest.mark.parametrize("task", COUNTS)
def test_official_tasks(shared, task):
    data = load_data(f"glue:{shared / 'glue' / task}", limit=1000, sequence_length=64)
    train, dev = COUNTS[task]
    assert (len(data.train), len(data.test)) == (1000, dev)
    assert len(data.validation) == round(train / 10)
    assert data.metric == METRICS[task]
    assert data.higher_is_better
    pair = task in ("RTE", "STS-B")
    for batch in DataLoader(data.test, batch_size=100, collate_fn=collate):
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape
        assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max() <= 64
        assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "attention_mask", "token_type_ids"))
        assert (batch["input_ids"][:, 0] == data.tokenizer.cls_token_id).all()
        assert (batch["input_ids"] == data.tokenizer.sep_token_id).sum(1).eq(2 if pair else 1).all()
        assert (batch["token_type_ids"].max(1).values == int(pair)).all()
        padding = batch["attention_mask"] == 0
        assert (batch["input_ids"][padding] == data.tokenizer.pad_token_id).all()
    if task == "STS-B":
        assert (data.task, data.num_classes, data.class_names) == ("sequence-regression", 1, None)
        assert batch["labels"].dtype == torch.float32
        assert 0 <= data.test.labels.min() < data.test.labels.max() <= 5
    else:
        assert (data.task, data.num_classes) == ("sequence-classification", 2)
        assert batch["labels"].dtype == torch.int64
    majority = np.bincount(data.train.labels.long()).argmax()
    accuracy = (data.test.labels == majority).double().mean().item()
    assert data.chance == (pytest.approx(accuracy) if data.metric == "accuracy" else 0.0)


def test_sentences_survive_the_file_and_the_tokenizer(tmp_path):
    train = 'sentence\tlabel\n" a quote that does not end , good\t1\nbad ""\t0\n' + sst2(40).partition("\n")[2]
    data = load_data(write_task(tmp_path, "SST-2", train, "sentence\tlabel\nFilm 3 is GOOD\t1\n"))
    assert data.tokenizer.decode(data.test[0]["input_ids"]) == "[CLS] film 3 is good [SEP]"
    decoded = {data.tokenizer.decode(sample["input_ids"], skip_special_tokens=True) for sample in data.train}
    decoded |= {data.tokenizer.decode(sample["input_ids"], skip_special_tokens=True) for sample in data.validation}
    held = [sample for sample in decoded if sample.startswith('" a quote')]
    assert len(held) == 1
    assert data.provenance["also in train, word for word"]["test"] == 0


def test_labels_are_the_official_ones(tmp_path):
    rte = "index\tsentence1\tsentence2\tlabel\n" + "".join(
        f"{i}\tit rains {i}\tit is wet\t{'entailment' if i % 2 else 'not_entailment'}\n" for i in range(20)
    )
    data = load_data(write_task(tmp_path, "RTE", rte, rte))
    assert data.class_names == ("entailment", "not_entailment")
    assert data.test.labels.tolist() == [1, 0] * 10
    assert data.provenance["also in train, word for word"]["test"] == 18


def test_splits_are_stratified_disjoint_and_the_same_again(tmp_path):
    name = write_task(tmp_path, "SST-2", sst2(200), sst2(10))
    data, again = load_data(name), load_data(name)
    assert np.bincount(data.validation.labels).tolist() == [10, 10]
    tokens = [{tuple(s["input_ids"].tolist()) for s in split} for split in (data.train, data.validation)]
    assert (len(tokens[0]), len(tokens[1])) == (180, 20)
    assert not tokens[0] & tokens[1]
    assert torch.equal(data.train.input_ids, again.train.input_ids)
    other = load_data(name, seed=1)
    assert other.tokenizer.get_vocab() != data.tokenizer.get_vocab()  # trained on the train split alone


def test_the_vocabulary_is_the_same_every_time():
    """tokenizers' trainer alone gives another vocabulary each time it is called, for it breaks ties by hash order."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdeé", k=generator.randint(2, 7))) for _ in range(10_000)]
    vocabularies = [train_wordpiece(words).get_vocab() for _ in range(3)]
    assert 1000 < len(vocabularies[0]) <= 8000
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_the_vocabulary_is_berts():
    tokenizer = train_wordpiece(["Some words, and some more words."] * 3)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.tokenize("SOME Words") == ["some", "words"]
    pair = tokenizer("some", "words")
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == ["[CLS]", "some", "[SEP]", "words", "[SEP]"]
    assert pair["token_type_ids"] == [0, 0, 0, 1, 1]


def test_a_tokenizer_directory_and_truncation(tmp_path):
    train_wordpiece([sst2(50)]).save_pretrained(tmp_path / "tokenizer")
    name = write_task(tmp_path, "SST-2", sst2(50), sst2(10))
    data = load_data(name, tokenizer=str(tmp_path / "tokenizer"), sequence_length=4)
    assert data.test.__getitems__([0, 1])["input_ids"].shape == (2, 4)
    assert (data.test.input_ids[:, 3] == data.tokenizer.sep_token_id).all()
    assert str(tmp_path / "tokenizer") in data.provenance["preprocessing"]


def test_a_tokenizer_changed_in_place_is_other_data(tmp_path):
    name, directory = write_task(tmp_path, "SST-2", sst2(50), sst2(10)), str(tmp_path / "tokenizer")
    digests = [load_data(name).provenance["sha256"]]
    for lower in (True, False):
        BertTokenizer(vocab=train_wordpiece([sst2(50)]).get_vocab(), do_lower_case=lower).save_pretrained(directory)
        digests += [load_data(name, tokenizer=directory).provenance["sha256"] for _ in range(2)]
    files = [tmp_path / "SST-2" / file for file in ("train.tsv", "dev.tsv")]
    assert digests[0] == hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    assert digests[1] == digests[2] != digests[3] == digests[4]
    assert digests[0] not in digests[1:]


def test_a_tokenizer_without_padding_or_token_types(tmp_path):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([sst2(50)], vocab_size=300, show_progress=False, special_tokens=["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>").save_pretrained(tmp_path / "bpe")
    data = load_data(write_task(tmp_path, "SST-2", sst2(50), sst2(12)), tokenizer=str(tmp_path / "bpe"))
    batch = data.test.__getitems__([1, 10])  # "film 1 ...", "film 10 ..."
    assert batch["attention_mask"].sum(1).unique().numel() == 2
    assert batch["token_type_ids"].sum() == 0


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    data = load_data(write_task(tmp_path, "SST-2", "\ufeff" + sst2(20), sst2(10)))
    assert len(data.train) == 18


def test_wrong_files_say_what_is_needed(tmp_path):
    good = sst2(20)
    for number, (task, train, dev, options, sentence) in enumerate(
        [
            ("QQP", good, good, {}, "Unknown GLUE task 'QQP' .*; known are CoLA, SST-2, RTE, STS-B"),
            ("SST-2", good.replace("label", "stars"), good, {}, "train.tsv' has no column 'label' in its first line"),
            ("SST-2", good, good + "more\tthan\ttwo\n", {}, "Line 22 of .*dev.tsv' has 3 columns where 2 are needed"),
            ("SST-2", good, good + "a film\t2\n", {}, "Line 22 of .* has the label '2'; needed: one of 0, 1"),
            ("SST-2", good, "sentence\tlabel\n", {}, "dev.tsv' has no rows"),
            ("SST-2", good, "", {}, "dev.tsv' has no"),
            ("SST-2", good, good, {"sequence_length": 2}, "sequence_length=2 leaves no room for words .* at least 3"),
            ("SST-2", sst2(2), good, {}, "has a class with too few samples to divide"),
            ("SST-2", good, good, {"tokenizer": "nowhere"}, "tokenizer='nowhere' is no directory"),
            ("CoLA", "a\t1\t\tfine\nb\t1\n", "", {}, "Line 2 of .* has 2 columns where 4 are needed"),
            (
                "STS-B",
                "sentence1\tsentence2\tscore\na\tb\tfive\n",
                "",
                {},
                "Line 2 of .* has the label 'five'; needed: a finite number",
            ),
            ("STS-B", "sentence1\tsentence2\tscore\na\tb\tnan\n", "", {}, "Line 2 of .* has the label 'nan'"),
        ]
    ):
        name = write_task(tmp_path / str(number), task, train, dev)
        with pytest.raises(ValueError, match=sentence):
            load_data(name, **options)
    with pytest.raises(ValueError, match=r"train.tsv' does not exist; a GLUE task is a folder with"):
        load_data(f"glue:{tmp_path}/SST-2")
    (tmp_path / "0" / "SST-2").mkdir()
    (tmp_path / "0" / "SST-2" / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(ValueError, match="is not a UTF-8 file"):
        load_data(f"glue:{tmp_path}/0/SST-2")
