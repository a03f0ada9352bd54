"""Parts of the straight-line models in the tests: the papers' formulas on plain tensors, named by state-dict keys."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def linear(s: State, name: str, x: Tensor) -> Tensor:
    y = x @ s[f"{name}.weight"].T
    return y + s[f"{name}.bias"] if f"{name}.bias" in s else y


def norm(s: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * s[f"{name}.weight"]
    return y + s[f"{name}.bias"] if f"{name}.bias" in s else y


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def conv(s: State, name: str, x: Tensor, **options) -> Tensor:
    return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), **options)


def batch_norm(s: State, name: str, x: Tensor, training: bool) -> Tensor:
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
    y = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-5)
    return y * s[f"{name}.weight"][:, None, None] + s[f"{name}.bias"][:, None, None]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H D] -> [B, H, N, D]"""
    return torch.stack(x.chunk(heads, dim=-1), dim=1)


def merge_heads(x: Tensor) -> Tensor:
    return torch.cat(x.unbind(1), dim=-1)


def l1(x: Tensor, eps: float) -> Tensor:
    return x / torch.maximum(x.abs().sum(2, keepdim=True), torch.tensor(eps, dtype=x.dtype))


def sima(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-12) -> Tensor:
    """The paper's two orders."""
    q, k = l1(q, eps), l1(k, eps)
    return (q @ k.mT) @ v if q.shape[2] < q.shape[3] else q @ (k.mT @ v)


def random_state(shapes: dict[str, tuple[int, ...]], scale: float = 1.0) -> State:
    """Float64 weights of these shapes; running variances are positive, counters are counters."""
    state: State = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
            continue
        fan = math.prod(shape[1:]) if len(shape) > 1 else 1
        values = torch.randn(shape, dtype=torch.float64) * scale * fan**-0.5
        state[name] = values.abs() + 0.1 if name.endswith("running_var") else values
    return state


def compare(
    model, forward, state: State, inputs: Tensor, tolerance: float = 1e-10, logits=lambda output: output
) -> None:
    """Assert that the model with `state` has the logits of `forward(state, inputs)` and all its gradients."""
    from oracles import close

    model.double().load_state_dict(state, strict=True)
    mine = {k: v.clone().requires_grad_(v.is_floating_point() and "running" not in k) for k, v in state.items()}
    images = inputs.clone().requires_grad_()
    expected, actual = forward(mine, images), logits(model(images))
    close(actual, expected, tolerance)
    cotangent = torch.randn_like(expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    theirs = torch.autograd.grad(expected, [mine[n] for n in names] + [images], cotangent, allow_unused=True)
    ours = torch.autograd.grad(actual, [*parameters, images], cotangent, allow_unused=True)
    for name, a, b in zip([*names, "images"], ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            close(a, b, tolerance, f"gradient of {name}")
