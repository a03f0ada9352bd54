"""What all tests share: no network, the same random numbers every time, one thread."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("formix", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("formix")


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # most tensors here are tiny, and threads that wait for each other take longer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
