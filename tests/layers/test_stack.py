"""Stacks of blocks: skip wiring across layers, checkpointing, intermediate outputs."""

import copy

import pytest
import torch
from oracles import close
from torch import nn

import formix
from formix.design import Design, GatedUnit, Pointwise, Sima, Softmax, Wiring
from formix.layers import Block, BlockStack

DIM, HEADS, DEPTH = 24, 3, 4


def stack_of(design, dtype=torch.float32, depth=DEPTH, **options):
    design = formix.design(design)
    blocks = [Block(DIM, HEADS, design=design.layer(i, depth), qkv_bias=True, **options) for i in range(depth)]
    stack = BlockStack(*blocks)
    for p in stack.parameters():
        nn.init.normal_(p, mean=0.02, std=0.15)
    return stack.to(dtype)


def by_hand(stack, x, **arguments):
    """Every block in turn, each reader given its source's own keys and values."""
    own = []
    for block in stack:
        source = block.layer_design.source
        source_kv = None if source is None else own[source]
        if hasattr(block.attn, "qkv"):
            x, kv = block(x, source_kv=source_kv, return_kv=True, **arguments)
        else:
            x, kv = block(x, **arguments), None
        own.append(kv)
    return x


def test_runs_the_blocks_in_turn(any_design):
    stack = stack_of(any_design, torch.float64).eval()
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    close(stack(x), by_hand(stack, x), 1e-12)
    mask = torch.rand(2, 1, 1, 7) > 0.3
    mask[..., 0] = True
    close(stack(x, attn_mask=mask), by_hand(stack, x, attn_mask=mask), 1e-12)


WIRINGS = {
    "distance_2": Wiring(source="distance(2)", heads=2),
    "last_2": Wiring(source="last(2,2)", heads=(0, 2)),
    "fixed_0": Wiring(source="fixed(0)", heads=1.0),
    "explicit": Wiring(source=(None, 0, None, 0), heads=((), (1,), (), (0, 2))),
    "no_heads": Wiring(heads=0),
}


@pytest.mark.parametrize("mixer", [Softmax(), Pointwise(), Sima(), Pointwise(qk_norm=True)], ids=lambda m: m.kind)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_skip_wiring(wiring, mixer):
    """A reader's attention by hand: K, V of the source's own projections (after its query-key norm) for its heads."""
    design = Design(mixer=mixer, wiring=WIRINGS[wiring])
    stack = stack_of(design, torch.float64).eval()
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    hidden, projected = x, []
    for i, block in enumerate(stack):
        h, attn = block.norm1(hidden), block.attn
        q, k, v = attn.qkv(h).reshape(2, 7, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        projected.append((k, v))
        source, heads = WIRINGS[wiring].resolve(DEPTH)[i], design.layer(i, DEPTH).skip_heads(HEADS)
        if source is not None:
            read = torch.tensor([j in heads for j in range(HEADS)])[None, :, None, None]
            k, v = (torch.where(read, s, own) for s, own in zip(projected[source], (k, v), strict=True))
        out = formix.layers.attend(mixer, q, k, v).transpose(1, 2).reshape(2, 7, DIM)
        hidden = hidden + attn.proj(out)
        hidden = hidden + block.mlp(block.norm2(hidden))
    close(stack(x), hidden, 1e-12)


def test_no_skip_heads_are_the_plain_stack_to_the_bit():
    plain, wired = stack_of("softmax").eval(), stack_of("skip(heads=0)").eval()
    wired.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 7, DIM)
    assert torch.equal(plain(x), wired(x))


def test_skip_wiring_adds_no_parameters():
    assert {k: v.shape for k, v in stack_of("softmax").state_dict().items()} == {
        k: v.shape for k, v in stack_of("skip").state_dict().items()
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_into_the_source(checkpointing):
    """With every head reading layer 0, layer 1's own key and value rows get none and layer 0's get more."""
    stack = stack_of("skip(source=fixed(0),heads=1.0)", depth=2).train()
    stack.grad_checkpointing = checkpointing
    stack(torch.randn(2, 7, DIM)).square().sum().backward()
    assert not stack[1].attn.qkv.weight.grad[DIM:].any()
    assert stack[1].attn.qkv.weight.grad[:DIM].any()
    assert stack[0].attn.qkv.weight.grad[DIM:].any()


def test_checkpointing_gives_equal_gradients(any_design):
    stack = stack_of(any_design).train()
    other = copy.deepcopy(stack)
    other.grad_checkpointing = True
    x = torch.randn(2, 7, DIM)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for s, x in zip((stack, other), inputs, strict=True):
        out = s(x)
        out.square().sum().backward()
    close(inputs[1].grad, inputs[0].grad, 1e-6, "gradient of x")
    expected = dict(stack.named_parameters())
    for name, p in other.named_parameters():
        close(p.grad, expected[name].grad, 1e-6, f"gradient of {name}")


def test_checkpointing_with_dropout_draws_the_same_numbers():
    stack = stack_of("relu+skip", proj_drop=0.2, drop_path=0.2, attn_drop=0.1).train()
    x, gradients = torch.randn(2, 7, DIM), []
    for checkpointing in (False, True):
        stack.grad_checkpointing = checkpointing
        stack.zero_grad()
        torch.manual_seed(1)
        stack(x).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in stack.named_parameters()})
    for name, want in gradients[0].items():
        close(gradients[1][name], want, 1e-6, f"gradient of {name}")


def test_checkpointing_recomputes(monkeypatch):
    stack, runs = stack_of("skip").train(), []
    stack[2].register_forward_pre_hook(lambda *_: runs.append(1))
    for checkpointing, expected in ((False, 1), (True, 2)):
        stack.grad_checkpointing = checkpointing
        runs.clear()
        stack(torch.randn(2, 7, DIM)).sum().backward()
        assert len(runs) == expected


def test_intermediates_and_stop():
    stack = stack_of("skip").eval()
    x = torch.randn(2, 7, DIM)
    taken = dict.fromkeys([0, 2], x)
    with torch.no_grad():
        out = stack(x, intermediates=taken)
        assert set(taken) == {0, 2}
        assert torch.equal(stack(x, stop_after=2), taken[2])
        assert torch.equal(stack[:3](x), taken[2])
        assert torch.equal(stack(x, stop_after=DEPTH - 1), out)


def test_a_part_of_the_blocks_reads_the_same_layers():
    stack = stack_of(Design(wiring=Wiring(source=(None, None, None, 1), heads=2))).eval()
    x = torch.randn(2, 7, DIM)
    close(stack[1:](stack[:1](x)), stack(x), 1e-6)
    with pytest.raises(ValueError, match="Layer 3 reads the keys and values of layer 1 and has been given none"):
        stack[2:](x)


def test_only_readers_are_given_keys_and_values():
    stack = stack_of("skip").eval()
    given = []

    def watch(block, args, out):
        given.append(args[3] is not None)

    for block in stack:
        block.register_forward_hook(watch)
    stack(torch.randn(2, 7, DIM))
    assert given == [False, True, True, True]


def test_hybrids():
    design = formix.design("activator", layers={1: Softmax(), -1: Pointwise()})
    stack = stack_of(design).eval()
    assert [type(b.attn).__name__ for b in stack] == ["GatedUnit", "Attention", "GatedUnit", "Attention"]
    assert isinstance(stack[0].layer_design.mixer, GatedUnit)
    x = torch.randn(2, 7, DIM)
    close(stack(x), by_hand(stack, x), 1e-6)


def test_causal_stack_does_not_see_the_future(any_design):
    stack = stack_of(any_design).eval()
    if isinstance(formix.design(any_design).mixer, Sima):
        with pytest.raises(ValueError, match="cannot be causal"):
            stack(torch.randn(2, 7, DIM), is_causal=True)
        return
    x = torch.randn(2, 7, DIM)
    other = torch.cat([x[:, :4], torch.randn(2, 3, DIM)], 1)
    assert torch.equal(stack(x, is_causal=True)[:, :4], stack(other, is_causal=True)[:, :4])
