"""A small image task and models for it."""

from typing import Any

import pytest

import formix
from formix.data import Data, load_data

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "class_token": False, "global_pool": "avg"}


@pytest.fixture(scope="session")
def digits() -> Data:
    return load_data("digits", limit=128)


@pytest.fixture(scope="session")
def make_model() -> Any:
    def make(design: str = "softmax", **kwargs: Any) -> Any:
        arguments = {**TINY, "img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, **kwargs}
        return formix.create_model("vit_tiny_patch16_224", design=design, **arguments)

    return make
