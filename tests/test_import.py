"""`import formix` in new processes: what it loads, what it does without, and in which order it may come."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import formix

OPTIONAL = (
    "timm",
    "transformers",
    "accelerate",
    "plotly",
    "torchvision",
    "sklearn",
    "torchmetrics",
    "rich",
    "datasets",
)
VIT = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
BERT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48, "vocab_size": 50}


def run(code, *arguments):
    """Standard output of the program in a new process."""
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_import_loads_torch_and_nothing_else_of_weight():
    code = f"import sys, formix; print([m for m in ('torch', *{OPTIONAL}) if m in sys.modules])"
    assert run(code) == "['torch']"


BLOCKED = f"""
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_design_and_operators_need_torch_alone():
    code = BLOCKED + (
        "import torch, formix, formix.ops\n"
        "x = torch.randn(1, 2, 5, 4)\n"
        "formix.ops.pointwise_attention(x, x, x), formix.ops.l1_attention(x, x, x)\n"
        "formix.ops.skip_layer_attention(x, x, x, x, x, skip_heads=1)\n"
        "assert formix.ops.implementations()\n"
        "assert [formix.design(n).to_json() for n in formix.list_designs()]\n"
        "try:\n"
        "    formix.create_model('vit_tiny_patch16_224', 'relu')\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    assert run(code).startswith("No module named ")


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    formix.save(formix.create_model("vit_tiny_patch16_224", "relu", **VIT), root / "vit")
    formix.save(formix.create_model("bert-tiny", "relu", **BERT), root / "bert")
    return {"vit": root / "vit", "bert": root / "bert"}


USE = """
import sys
print(type(timm.create_model("local-dir:" + sys.argv[1], pretrained=True)).__name__)
print(type(AutoModel.from_pretrained(sys.argv[2])).__name__)
assert timm.is_model("formix_vit") and timm.list_models("formix_vit") == ["formix_vit"]
config = AutoConfig.for_model("formix_bert", design=formix.design("sima").to_dict())
assert type(config).__module__ == "formix.models.bert"
assert type(timm.create_model("vit_tiny_patch16_224", depth=1)).__module__ == "timm.models.vision_transformer"
assert type(AutoConfig.for_model("bert")).__module__.startswith("transformers.")
"""
ORDERS = {
    "formix_first": "import formix\nimport timm\nfrom transformers import AutoConfig, AutoModel",
    "formix_last": "import timm\nfrom transformers import AutoConfig, AutoModel\nimport formix",
    "between": (
        "import transformers, timm.layers\nfrom transformers import AutoConfig\nimport formix\n"
        "from transformers import AutoModel"
    ),
    "formix_twice": (
        "import formix, importlib, timm\nformix._hooks.install()\nimportlib.reload(formix)\n"
        "from transformers import AutoConfig, AutoModel"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_registers_whichever_is_imported_first(order, directories):
    """formix's models are found, and those of timm and transformers stay theirs."""
    out = run(ORDERS[order] + USE, directories["vit"], directories["bert"])
    assert out.split() == ["FormixVisionTransformer", "FormixBertModel"]
