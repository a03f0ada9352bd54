"""What others put into a model's linear layers is neither bypassed nor broken: adapters, hooks, quantisation."""

import pytest
import text_families
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from transformers.pytorch_utils import Conv1D

import formix
from formix.models.published import PUBLISHED

DESIGNS = [*formix.list_designs(), "activator(inner_norm=true)", "activator(official=true)", "relu(gate=silu)+parallel"]
VIT = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
OWN = {  # timm's names of every kind of block of their own, and other trunks
    "vit_small_patch16_rope_224": {"img_size": 32, "depth": 1},
    "vit_relpos_small_patch16_224": {"img_size": 32, "depth": 1},
    "vit_small_patch16_18x2_224": {"img_size": 32, "depth": 1},
    "vit_dwee_patch16_reg1_gap_256": {"img_size": 32, "depth": 1},
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 1},
    "cvt-13": {"depth": [1, 1, 1], "embed_dim": [16, 16, 16], "num_heads": [1, 1, 1]},
}
SMALL = {
    **{f"vit {design}": ("vit_tiny_patch16_224", design, VIT) for design in DESIGNS},
    **{f"{name} sima": (name, "sima", size) for name, size in OWN.items()},
    **{name: (name, None, {"depth": 1, "img_size": 32}) for name in PUBLISHED if "_24" not in name},
}
TEXTS = {
    f"{family} {design}": (family, design)
    for family in text_families.SMALL
    for design in DESIGNS
    if family not in text_families.DECODERS or not design.startswith(("sima", "activator"))  # which are not causal
}


class Adapter(nn.Module):
    """A low-rank adapter as PEFT's: beside the layer, whose weight it shows as its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        c_in, c_out = base.weight.shape[::-1] if isinstance(base, nn.Linear) else base.weight.shape
        self.down, self.up = nn.Linear(c_in, 2), nn.Linear(2, c_out)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def made(case):
    """A model in evaluation mode with random weights, and a function that runs it."""
    if case in TEXTS:
        model = text_families.small(*TEXTS[case], num_hidden_layers=2)
        tokens = text_families.tokens(2, 6)
        return model, lambda m: m(tokens)[0]
    name, design, size = SMALL[case]
    model = formix.create_model(name, design, **size).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    x = torch.randn(2, 3, *((64, 64) if name == "cvt-13" else (32, 32)))
    return model, lambda m: m(x).logits if name == "cvt-13" else m(x)


def linears(model):
    """Names and layers; transformers' GPT-2 has layers of its own."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]


@pytest.mark.parametrize("case", [*SMALL, *TEXTS])
@torch.no_grad()
def test_an_adapter_on_any_linear_layer_changes_the_output(case):
    model, run = made(case)
    before = run(model)
    silent = []
    for name, layer in linears(model):
        model.set_submodule(name, Adapter(layer))
        if torch.equal(run(model), before):
            silent.append(name)
        model.set_submodule(name, layer)
    assert not silent
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("case", [*SMALL, *TEXTS])
@torch.no_grad()
def test_a_hook_on_any_module_runs(case):
    model, run = made(case)
    called = set()
    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
    run(model)
    assert {name for name, _ in linears(model)} <= called


@pytest.mark.parametrize("case", [*SMALL, *TEXTS])
@torch.no_grad()
def test_dynamic_quantisation(case):
    model, run = made(case)
    quantised = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(m) is nn.Linear for m in quantised.modules())
    assert run(quantised).isfinite().all()
