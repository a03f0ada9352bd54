"""What holds for every source: the interface, its batches in a DataLoader, and the sentences for wrong requests."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from formix.data import collate, list_data, load_data

EMBEDDED = ["digits", "stdlib"]


@pytest.fixture(scope="module", params=EMBEDDED)
def data(request):
    return load_data(request.param, limit={"digits": None, "stdlib": 300_000}[request.param])


def test_every_source_is_described():
    assert {"digits", "stdlib", "fashion-mnist", "folder:PATH", "glue:DIR/TASK", "hf:NAME"} <= list_data().keys()
    assert all(description and "\n" not in description for description in list_data().values())


def test_a_batch_equals_its_samples(data):
    batch = data.test.__getitems__([3, 0, 5])
    for row, index in enumerate([3, 0, 5]):
        sample = data.test[index]
        assert sample.keys() == batch.keys()
        assert all(torch.equal(sample[key], batch[key][row]) for key in batch)
    stacked = collate([data.test[3], data.test[0], data.test[5]])
    assert all(torch.equal(stacked[key], batch[key]) for key in batch)


def test_a_loader_gives_every_sample_once(data):
    loader = DataLoader(data.validation, batch_size=50, collate_fn=collate, num_workers=1)
    batches = list(loader)
    assert sum(len(batch["labels"]) for batch in batches) == len(data.validation)
    whole = data.validation.__getitems__(range(len(data.validation)))
    assert all(torch.equal(torch.cat([batch[key] for batch in batches]), whole[key]) for key in whole)


def test_samples_end(data):
    assert len(list(data.validation)) == len(data.validation)
    with pytest.raises(IndexError):
        data.validation[len(data.validation)]


def test_provenance_is_json_and_counts_the_samples(data):
    provenance = json.loads(json.dumps(data.provenance))
    assert {"source", "licence", "preprocessing", "sha256", "counts"} <= provenance.keys()
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    assert provenance["counts"] == {split: len(dataset) for split, dataset in splits.items()}


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_same_request_gives_the_same_data(name):
    first, second = (load_data(name, seed=3, limit=200_000) for _ in range(2))
    assert first.provenance == second.provenance
    assert math.isclose(first.chance, second.chance)


def test_importing_loads_torch_alone():
    code = (
        "import sys, formix.data; "
        "loaded = {'timm', 'transformers', 'torchvision', 'sklearn', 'tokenizers', 'PIL'} & set(sys.modules);"
        "sys.exit(' '.join(loaded))"
    )
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True).stderr.strip() == ""


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("mnist", {}, r"Unknown data 'mnist'; known are digits, fashion-mnist, cifar10, .*folder:PATH"),
        ("", {}, "Unknown data ''"),
        ("digits:8", {}, "Unknown data 'digits:8'"),
        ("folder", {}, "Unknown data 'folder'.*folder:PATH"),
        ("folder:", {}, "Unknown data 'folder:'"),
        ("digits", {"img_size": 0}, "img_size=0 must be between 1 and 4096"),
        ("digits", {"img_size": 5000}, "img_size=5000 must be between 1 and 4096"),
        ("digits", {"img_size": 4096}, "img_size=4096 would make 'digits' 28 GiB large.*choose a smaller"),
        ("digits", {"limit": 0}, "limit=0 must be at least 1"),
        ("digits", {"seed": -1}, "seed=-1 must be between 0 and 4294967295"),
        ("digits", {"validation_fraction": 0.0}, "validation_fraction=0.0 must lie between 0 and 1"),
        ("digits", {"test_fraction": 1.5}, "test_fraction=1.5 must lie between 0 and 1"),
        (
            "digits",
            {"validation_fraction": 0.8},
            "validation_fraction=0.8 and test_fraction=0.2 leave nothing to train",
        ),
        ("digits", {"tokenizer": "bert"}, "tokenizer='bert' is for text, and 'digits' is images"),
        ("stdlib", {"img_size": 32}, "img_size=32 is for images, and 'stdlib' is text"),
        ("stdlib", {"sequence_length": 0}, "sequence_length=0 must be at least 1"),
        ("stdlib", {"limit": 100}, r"train part of 'stdlib' has 100 tokens, and one window has 129 .*give more text"),
    ],
)
def test_wrong_requests_say_what_is_allowed(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_data(name, **options)
