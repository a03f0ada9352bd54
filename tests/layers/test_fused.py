"""The parallel block's fused form: the same numbers, and only where it is the same function."""

import copy
import pickle

import pytest
import torch
from oracles import close, source_of
from timm.layers import DropPath
from torch import nn

import formix
from formix.layers import Attention, Block

DIM, HEADS = 24, 3
DESIGNS = ["paf", "parallel", "relu+parallel", "sima+paf", "relu(gate=silu,qk_norm=true)+parallel", "parallel+skip"]
OPTIONS = {
    "plain": {},
    "bias": {"qkv_bias": True},
    "no_bias": {"proj_bias": False},
    "layer_scale": {"init_values": 0.3, "qkv_bias": True},
    "qk_norm": {"qk_norm": True, "scale_attn_norm": True},
}


def block_of(design="parallel", dtype=torch.float32, **options):
    block = Block(DIM, HEADS, design=formix.design(design).layer(1, 2), **options)
    for p in block.parameters():
        nn.init.normal_(p, mean=0.05, std=0.2)
    return block.to(dtype)


def unfused(block):
    """The same block without its fused form."""
    plain = copy.deepcopy(block)
    plain._fused = None
    return plain


def fused_calls(block, monkeypatch):
    """A list that grows when the block's fused form runs."""
    calls = []
    run = type(block._fused).__call__

    def counted(self, *args):
        calls.append(self)
        return run(self, *args)

    monkeypatch.setattr(type(block._fused), "__call__", counted)
    return calls


@pytest.mark.parametrize("mode", ["eval_no_grad", "eval_grad", "train"])
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("design", DESIGNS)
def test_equals_the_separate_form(design, case, mode, monkeypatch):
    block = block_of(design, **OPTIONS[case]).train(mode == "train")
    plain = unfused(block)
    calls = fused_calls(block, monkeypatch)
    x = torch.randn(2, 7, DIM)
    source = source_of(block, x)
    with torch.set_grad_enabled(mode != "eval_no_grad"):
        close(block(x, **source), plain(x, **source), 1e-6)
    assert len(calls) == 1
    if mode == "eval_no_grad":
        return
    for b in (block, plain):
        b(x, **source).square().sum().backward()
    expected = dict(plain.named_parameters())
    for name, p in block.named_parameters():
        close(p.grad, expected[name].grad, 1e-5, f"gradient of {name}", floor=0.1)


def test_equals_the_separate_form_with_masks_and_sources():
    block = block_of("relu+parallel+skip", qkv_bias=True).eval()
    assert block.attn.skip_heads == (0, 1)
    plain = unfused(block)
    x = torch.randn(2, 7, DIM)
    source = torch.randn(2, HEADS, 7, 8), torch.randn(2, HEADS, 7, 8)
    arguments = {"attn_mask": torch.rand(2, 1, 7, 7) > 0.3, "is_causal": True, "source_kv": source, "return_kv": True}
    (out, own), (expected, expected_own) = block(x, **arguments), plain(x, **arguments)
    close(out, expected, 1e-6)
    for got, want in zip(own, expected_own, strict=True):
        close(got, want, 1e-6)
    arguments["source_kv"] = source[0].flip(2), source[1].flip(2)
    assert not torch.equal(out, block(x, **arguments)[0])


def test_float64():
    block = block_of("paf", torch.float64, qkv_bias=True).eval()
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    close(block(x), unfused(block)(x), 1e-14)


def test_the_parameters_on_disk_are_the_separate_ones():
    names = set(block_of(qkv_bias=True).state_dict())
    assert names == set(Block(DIM, HEADS, qkv_bias=True).state_dict()) - {"norm2.weight", "norm2.bias"}


@pytest.mark.parametrize("options", [{"proj_drop": 0.1}, {"drop_path": 0.1}], ids=str)
def test_active_dropout_keeps_the_branches_apart(options, monkeypatch):
    block = block_of(**options)
    calls = fused_calls(block, monkeypatch)
    x = torch.randn(2, 7, DIM)
    block(x)
    assert not calls
    block.eval()(x)
    assert len(calls) == 1


@pytest.mark.parametrize("options", [{"proj_drop": 0.5}, {"drop_path": 0.5}], ids=str)
def test_dropouts_alone_in_training_mode(options):
    block, x = block_of(**options).eval(), torch.randn(16, 7, DIM)
    assert torch.equal(block(x), block(x))
    for part in block.modules():
        if isinstance(part, nn.Dropout | DropPath):
            part.train()
    assert not torch.equal(block(x), block(x))


def test_dropout_of_attention_weights_alone_can_be_fused(monkeypatch):
    block = block_of(attn_drop=0.5)
    calls = fused_calls(block, monkeypatch)
    x = torch.randn(2, 7, DIM)
    assert not torch.equal(block(x), block(x))
    assert len(calls) == 2


PARTS = ["attn", "attn.qkv", "attn.proj", "attn.proj_drop", "mlp", "mlp.fc1", "mlp.fc2", "mlp.drop1", "ls1", "ls2"]
HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("part", [*PARTS, "mlp.act", "attn.q_norm"])
def test_a_hook_on_any_part_runs(part, hook):
    block = block_of(qkv_bias=True, init_values=0.3, qk_norm=True).eval()
    x = torch.randn(2, 7, DIM, requires_grad=True)
    expected = block(x)
    calls = []
    handle = getattr(block.get_submodule(part), hook)(lambda *_: calls.append(1))
    out = block(x)
    close(out, expected, 1e-6)
    out.sum().backward()
    assert calls
    handle.remove()
    calls.clear()
    block(x)
    assert not calls


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_an_adapter_on_a_projection_is_not_bypassed(part):
    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    block = block_of(qkv_bias=True).eval()
    x = torch.randn(2, 7, DIM)
    parent, name = block.get_submodule(part.split(".")[0]), part.split(".")[1]
    old = getattr(parent, name)
    adapter = Adapter(old.in_features, old.out_features)
    adapter.load_state_dict(old.state_dict())
    before = block(x)
    setattr(parent, name, adapter)
    assert not torch.allclose(block(x), before, atol=1e-3)
    close(block(x), unfused(block)(x), 1e-6)


def test_a_replaced_forward_is_not_bypassed():
    """accelerate's hooks are none of torch's."""
    block = block_of().eval()
    x = torch.randn(2, 7, DIM)
    before = block(x)
    forward = block.attn.proj.forward
    block.attn.proj.forward = lambda x: forward(x) + 1
    close(block(x), before + 1, 1e-6)


def test_a_parametrised_weight_is_not_bypassed():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    block = block_of().eval()
    torch.nn.utils.parametrize.register_parametrization(block.attn.proj, "weight", Double())
    x = torch.randn(2, 7, DIM)
    with torch.no_grad():
        close(block(x), unfused(block)(x), 1e-6)


class Quantised(torch.Tensor):
    """A weight that multiplies and does nothing else, as torchao's: int8 rows with a scale each."""

    @staticmethod
    def __new__(cls, rows, scale):
        return torch.Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scale.dtype, device=rows.device)

    def __init__(self, rows, scale):
        self.rows, self.scale = rows, scale

    def __tensor_flatten__(self):
        return ["rows", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts, meta, size, stride):
        return Quantised(parts["rows"], parts["scale"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, w, b = args
            return nn.functional.linear(x, w.rows.to(x.dtype) * w.scale, b)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Quantised(args[0].rows, args[0].scale)
        raise NotImplementedError(f"{func} of quantised weights")


def test_quantised_weights_are_not_joined():
    block = block_of().eval()
    x = torch.randn(2, 7, DIM)
    with torch.no_grad():
        before = block(x)
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            scale = linear.weight.abs().amax(1, keepdim=True) / 127
            rows = (linear.weight / scale).round().to(torch.int8)
            linear.weight = nn.Parameter(Quantised(rows, scale), requires_grad=False)
        close(block(x), before, 0.05)


def test_a_replaced_part_is_not_bypassed():
    class Other(Attention):
        def forward(self, x, *args, **kwargs):
            out, own = super().forward(x, *args, **kwargs)
            return out + 1, own

    block = block_of().eval()
    x = torch.randn(2, 7, DIM)
    with torch.no_grad():
        before = block(x)
        attn = Other(DIM, HEADS)
        attn.load_state_dict(block.attn.state_dict())
        block.attn = attn
        close(block(x), before + 1, 1e-6)
        block.mlp = nn.Identity()
        close(block(x), unfused(block)(x), 1e-6)


def changed(kind, block):
    """Change the weights in the way named, with the memory of the old ones freed where the way frees it."""
    if kind == "optimizer":
        block.train()
        block(torch.randn(2, 7, DIM)).square().sum().backward()
        torch.optim.SGD(block.parameters(), lr=0.1).step()
        block.eval()
    elif kind in ("adamw_fused", "adamw_foreach"):
        block.train()
        block(torch.randn(2, 7, DIM)).square().sum().backward()
        torch.optim.AdamW(block.parameters(), lr=0.1, **{kind.removeprefix("adamw_"): True}).step()
        block.eval()
    elif kind == "optimizer_in_eval_mode":
        block(torch.randn(2, 7, DIM)).square().sum().backward()
        torch.optim.SGD(block.parameters(), lr=0.1).step()
    elif kind == "load_state_dict":
        block.load_state_dict({k: v * 1.5 for k, v in block.state_dict().items()})
    elif kind == "assign":
        block.load_state_dict({k: v * 1.5 for k, v in block.state_dict().items()}, assign=True)
    elif kind == "half_and_back":
        block.half().float()
    elif kind == "in_place":
        with torch.no_grad():
            block.mlp.fc2.weight.mul_(1.5)
    elif kind == "layer_scale":
        with torch.no_grad():
            block.ls1.gamma.fill_(3.0)
    elif kind == "data_and_train":
        block.attn.proj.weight.data.mul_(1.5)
        block.train().eval()
    elif kind == "new_data":
        block.attn.proj.weight.data = block.attn.proj.weight.data * 1.5


@pytest.mark.parametrize(
    "kind",
    [
        "optimizer", "adamw_fused", "adamw_foreach", "optimizer_in_eval_mode", "load_state_dict", "assign",
        "half_and_back", "in_place", "layer_scale", "data_and_train", "new_data",
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_changed_weights_are_seen(kind, mode):
    block = block_of(qkv_bias=True, init_values=0.3).eval()
    x = torch.randn(2, 7, DIM)
    context = torch.no_grad if mode == "no_grad" else torch.inference_mode
    with context():
        before = block(x)
        assert block._fused._kept is not None, "the joined weights are kept between evaluations"
    for _ in range(3):  # freed memory is taken again in the second round
        changed(kind, block)
        with context():
            out, expected = block(x), unfused(block)(x)
        close(out, expected, 1e-6)
    assert not torch.equal(out, before)


def test_a_model_made_in_inference_mode_runs():
    with torch.inference_mode():
        block = block_of(qkv_bias=True).eval()
        x = torch.randn(2, 7, DIM)
        close(block(x), unfused(block)(x), 1e-6)
        block.mlp.fc2.weight.mul_(1.5)
        close(block(x), unfused(block)(x), 1e-6)


def test_functional_call_and_vmap():
    """The joined weights of an ensemble's members, and of weights that are passed in."""
    block, x = block_of("relu+parallel", qkv_bias=True).eval(), torch.randn(2, 7, DIM)
    with torch.no_grad():
        block(x)
        stacked = {k: torch.stack([v, 1.5 * v]) for k, v in block.state_dict().items()}
        out = torch.vmap(lambda w: torch.func.functional_call(block, w, (x,)))(stacked)
        for i in (0, 1):
            one = {k: v[i] for k, v in stacked.items()}
            expected = torch.func.functional_call(unfused(block), one, (x,))
            close(torch.func.functional_call(block, one, (x,)), expected, 1e-6)
            close(out[i], expected, 1e-5)


def test_copies_keep_nothing_of_the_original():
    block, x = block_of().eval(), torch.randn(2, 7, DIM)
    with torch.no_grad():
        expected = block(x)
        for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert other._fused is not block._fused
            assert other._fused._kept is None
            assert torch.equal(other(x), expected)


def test_replicas_have_their_own_weights():
    """As torch.nn.DataParallel makes them for each device: shallow copies, with tensors in place of parameters."""
    block, x = block_of(qkv_bias=True, init_values=0.3).eval(), torch.randn(2, 7, DIM)

    def replica(module, factor):
        other = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            setattr(other, name, replica(child, factor))
        for name, parameter in module.named_parameters(recurse=False):
            setattr(other, name, factor * parameter.detach())
        return other

    other = block_of(qkv_bias=True, init_values=0.3).eval()
    for factor in (1.5, 0.5):
        other.load_state_dict({k: factor * v for k, v in block.state_dict().items()})
        with torch.no_grad():
            block(x)
            close(replica(block, factor)(x), unfused(other)(x), 1e-6)
            close(block(x), unfused(block)(x), 1e-6)


def test_autocast():
    block, x = block_of(qkv_bias=True).eval(), torch.randn(2, 7, DIM)
    with torch.no_grad():
        expected = block(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x)
        close(out, expected, 3e-2)
        assert torch.equal(block(x), expected), "what was kept under autocast must not be used without it"


@pytest.mark.parametrize("design", ["softmax", "activator", "activator-glu", "activator+parallel"])
def test_other_blocks_have_no_fused_form(design):
    assert Block(DIM, HEADS, design=design)._fused is None


def test_a_scaled_mlp_norm_is_not_fused():
    assert block_of(scale_mlp_norm=True)._fused is None
