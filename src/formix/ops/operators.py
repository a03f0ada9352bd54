"""`torch.ops.formix.pointwise_attention` and `l1_attention`: the operators that the kernels implement, with shapes for
tracing, gradients and autocast. Their gradients are operators with kernels too; the gradient of a gradient is computed
by the plain-torch reference. Each device's kernels register themselves: `formix.ops.native` those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

TYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels
MAX_CHANNELS = 256


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty [B, H, N, D] that lies in memory as [B, N, H, D]."""
    b, h, n, d = shape
    return like.new_empty((b, n, h, d)).transpose(1, 2)


def _transformed() -> bool:
    """Whether this is inside a transform of torch.func."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# As torch.compiler.assume_constant_result marks it, which imports the whole compiler: asked while tracing, not traced.
# Traced, it fails in PyTorch 2.6, and answers with an object in place of None in 2.14.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cannot_take(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why no kernel, on whatever device, takes these tensors, or None if they can be taken. Query, key and value are of
    one type and on one device."""
    if _transformed() or forward_ad._current_level >= 0:
        return "the kernels know backward differentiation alone, no transforms of torch.func and no forward mode"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in TYPES:
            return f"{name} is {tensor.dtype}, and the kernels take float32, bfloat16 and float16"
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            return f"the channels of {name} are not contiguous"
        if tensor.shape[-1] > MAX_CHANNELS:
            return f"{name} has {tensor.shape[-1]} channels for each head, and the kernels take at most {MAX_CHANNELS}"
    return None


def dense(*tensors: Tensor) -> list[Tensor]:
    """With channels side by side. An exported program, or a caller of the operator itself, may pass any strides.

    Raises:
        ValueError: dtypes that differ or that the kernels do not have.
    """
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or not dtypes <= set(TYPES):
        found = ", ".join(str(t.dtype) for t in tensors)
        raise ValueError(f"The tensors have dtypes {found}; the kernels take one of {', '.join(map(str, TYPES))}.")
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _pointwise_reference(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    from formix.ops.pointwise import pointwise_attention as attention

    mask, activation, length_exponent, length, is_causal, scale = options
    return attention(
        query,
        key,
        value,
        attn_mask=mask,
        activation=activation,
        length_exponent=length_exponent,
        length=length,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        impl="reference",
    )


def _l1_reference(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, eps: float) -> Tensor:
    from formix.ops.l1 import l1_attention as attention

    return attention(query, key, value, key_padding_mask=key_padding_mask, order="fused", eps=eps, impl="reference")


def _define(library: torch.library.Library, name: str, options: str, reference: Any) -> None:
    """Defines name and name_backward; `options` is the schema of what follows query, key and value."""
    namespace = library.ns
    qkv = "Tensor query, Tensor key, Tensor value"
    library.define(f"{name}({qkv}, {options}) -> Tensor")
    library.define(f"{name}_backward(Tensor grad_out, {qkv}, {options}) -> (Tensor, Tensor, Tensor)")
    operators = getattr(torch.ops, namespace)
    op = getattr(operators, name).default
    backward_op = getattr(operators, f"{name}_backward").default

    @torch.library.register_fake(f"{namespace}::{name}", lib=library)
    def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        return empty(query, (*query.shape[:3], value.shape[-1]))

    @torch.library.register_fake(f"{namespace}::{name}_backward", lib=library)
    def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return tuple(empty(t, t.shape) for t in (query, key, value))

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]

    def restore(ctx: Any) -> list[Any]:
        tensors = iter(ctx.saved_tensors)
        return [next(tensors) if there else x for there, x in zip(ctx.is_tensor, ctx.others, strict=True)]

    def differentiate(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        inputs = restore(ctx)
        gradients = backward_op(grad_out, *inputs)
        return *gradients, *[None] * (len(inputs) - 3)

    def differentiate_twice(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # The gradient of (grad_out, q, k, v) -> (dq, dk, dv), by plain torch: the kernels have no such formula.
        grad_out, *qkv = [x.detach().requires_grad_() for x in restore(ctx)[:4]]
        rest = restore(ctx)[4:]
        with torch.enable_grad():
            first = torch.autograd.grad(reference(*qkv, *rest), qkv, grad_out, create_graph=True)
            pairs = [(f, g) for f, g in zip(first, grads, strict=True) if g is not None and f.requires_grad]
            second = torch.autograd.grad(
                [f for f, _ in pairs], [grad_out, *qkv], [g for _, g in pairs], allow_unused=True
            )
        return *second, *[None] * len(rest)

    torch.library.register_autograd(f"{namespace}::{name}", differentiate, setup_context=save, lib=library)
    torch.library.register_autograd(
        f"{namespace}::{name}_backward", differentiate_twice, setup_context=save, lib=library
    )

    for device in ("CPU", "CUDA"):
        library.impl(name, _autocast(op, device), f"Autocast{device}")


def _autocast(op: Any, device: str) -> Any:
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

    def run(query: Tensor, key_: Tensor, value: Tensor, *rest: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device.lower())
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(query.to(dtype), key_.to(dtype), value.to(dtype), *rest)

    return run


def _count_operations(namespace: str) -> None:
    """Tells PyTorch's FlopCounterMode the matrix products of both operators and their gradients, of (query, key, value)
    shapes; as for its own fused attention, masked pairs count too and gradients recompute what the kernels do."""
    operators = getattr(torch.ops, namespace)

    def register(name: str, count: Callable[..., int]) -> None:
        register_flop_formula(getattr(operators, name))(lambda q, k, v, *rest, **_: count(*q, k[2], v[3]))
        backward = getattr(operators, f"{name}_backward")
        register_flop_formula(backward)(lambda g, q, k, v, *rest, **_: count(*q, k[2], v[3], forward=False))

    def pointwise(b: int, h: int, n_q: int, d: int, n_k: int, d_v: int, forward: bool = True) -> int:
        return 2 * b * h * n_q * n_k * (d + d_v if forward else 3 * d + 2 * d_v)

    def l1(b: int, h: int, n_q: int, d: int, n_k: int, d_v: int, forward: bool = True) -> int:
        return 2 * b * h * d * d_v * (n_q + n_k if forward else 2 * n_q + 3 * n_k)

    register("pointwise_attention", pointwise)
    register("l1_attention", l1)


def define(namespace: str) -> torch.library.Library:
    """Defines both operators under a namespace; the result must be kept, for they live as long as it does."""
    library = torch.library.Library(namespace, "DEF")
    mask_and_options = (
        "Tensor? attn_mask, str activation, float length_exponent, SymInt? length, bool is_causal, float scale"
    )
    _define(library, "pointwise_attention", mask_and_options, _pointwise_reference)
    _define(library, "l1_attention", "Tensor? key_padding_mask, float eps", _l1_reference)
    _count_operations(namespace)
    return library


library = define("formix")
