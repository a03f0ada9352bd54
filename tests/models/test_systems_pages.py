"""The calls on the pages of docs/systems run, and the model names there exist."""

import re
from pathlib import Path

import pytest
import timm
import torch

import formix
from formix.models.published import PUBLISHED

PAGES = Path(__file__).parents[2] / "docs" / "systems"
CALL = re.compile(r"formix\.create_model\((?:[^()]|\([^()]*\))*\)")
NAME = re.compile(r"`((?:sima|relu_vit|activator|uniform_activator|ninformer)_\w*\d)`")


@pytest.mark.parametrize("page", ["sima", "activator", "relu_attention"])
def test_calls_and_names(page):
    text = (PAGES / f"{page}.md").read_text()
    calls = CALL.findall(text)
    assert len(calls) >= 4
    with torch.device("meta"):
        for call in calls:
            eval(call, {"formix": formix})
    names = set(NAME.findall(text))
    assert len(names) >= 4
    assert all(name in PUBLISHED and timm.is_model(name) for name in names)
