"""SimA's attention in Triton, in the fused order: O = Q C K^T V with C = diag(c),
c_j = 1 / (max(|q_:j|_1, eps) max(|k_:j|_1, eps)) (arXiv 2206.08898, eq. 4). With M = K^T V and G = Q^T dO,

    dQ = dO M^T C + sign(Q) diag(u),  dK = V G^T C + sign(K) diag(w),  dV = K C G,
    u_j = -c_j (G M^T)_jj / |q_:j|_1,  w_j likewise with k; zero where eps is larger than the norm.

One kernel sums products and norms over tokens, for parts of the tokens whose sums are then added up; one multiplies
every token by a [D, Dv] matrix. What is small, [B, H, D, Dv], is plain torch in float32. No atomics: the same inputs
give the same bits. Verified in Triton's interpreter and compiled for GPUs; not run or timed on one.

K^T V and Q^T dO may leave float32's range where, over the norms, they are far from it. So every channel is multiplied
by a power of two that its norm so far gives, which rounds nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from formix.ops.operators import dense, empty
from formix.ops.triton_pointwise import precision, rounded

PART = 1024  # tokens whose sums one program takes
VARYING = ["N", "HEADS"]  # with the length of a sequence and the batch: a new one compiles nothing


@triton.jit
def _load(start, tokens, stride, channels, N, SIZE, token):
    inside = token[:, None] & (tokens[:, None] < N) & (channels[None, :] < SIZE)
    return tl.load(start + tokens.to(tl.int64)[:, None] * stride + channels[None, :], inside, other=0.0)


@triton.jit
def _tokens(start, tokens, stride, N, MASKED: tl.constexpr):
    """Which of them are no padding."""
    if MASKED:  # noqa: SIM108
        token = tl.load(start + tokens.to(tl.int64) * stride, tokens < N, other=0) != 0
    else:
        token = tokens < N
    return token


@triton.jit
def _power(norm):
    """A power of two that makes a norm above 1 at most 1; of an infinite one it is the smallest normal number."""
    bits = tl.maximum(253 - (norm.to(tl.int32, bitcast=True) >> 23), 1) << 23
    return tl.where(norm > 1, bits.to(tl.float32, bitcast=True), 1.0)


@triton.jit(do_not_specialize=VARYING)
def sum_kernel(
    X, Y, MASK, NORM, PRODUCT, x_b, x_h, x_n, y_b, y_h, y_n, m_b, m_n, H, HEADS, N, D: tl.constexpr, D_V: tl.constexpr,
    PART: tl.constexpr, SHRUNK: tl.constexpr, WITH_PRODUCT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of one part of the tokens of one head, BLOCK_D of the norms sum_n |X_nd| and, if wanted, their rows of X^T Y,
    times the norms' powers if SHRUNK.

    NORM is [parts, B, H, D] and PRODUCT [parts, B, H, D, Dv], both float32.
    """
    tiles_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tiles_v: tl.constexpr = (D_V + BLOCK_V - 1) // BLOCK_V if WITH_PRODUCT else 1
    tile, rest = tl.program_id(0) % (tiles_d * tiles_v), tl.program_id(0) // (tiles_d * tiles_v)
    head, part = (rest % HEADS).to(tl.int64), (rest // HEADS).to(tl.int64)
    b, h = head // H, head % H
    d = tile // tiles_v * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tile % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V)
    norm = tl.zeros([BLOCK_D], tl.float32)
    product = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
    power = tl.full([BLOCK_D], 1.0, tl.float32)
    start = part.to(tl.int32) * PART
    for first in range(start, tl.minimum(start + PART, N), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        token = _tokens(MASK + b * m_b, n, m_n, N, MASKED)
        x = _load(X + b * x_b + h * x_h, n, x_n, d, N, D, token)
        norm += tl.sum(tl.abs(x.to(tl.float32)), 0)
        if WITH_PRODUCT:
            y = _load(Y + b * y_b + h * y_h, n, y_n, e, N, D_V, token)
            if SHRUNK:
                before = power
                power = _power(norm)
                product *= (power / before)[:, None]
                x = (x.to(tl.float32) * power[None, :]).to(y.dtype)
            product = tl.dot(tl.trans(x), y, product, input_precision=PRECISION)
    row = part * HEADS + head
    if tile % tiles_v == 0:
        tl.store(NORM + row * D + d, norm, d < D)
    if WITH_PRODUCT:
        where = PRODUCT + (row * D + d[:, None]) * D_V + e[None, :]
        tl.store(where, product, (d[:, None] < D) & (e[None, :] < D_V))


@triton.jit(do_not_specialize=VARYING)
def apply_kernel(
    X, W, POWER, Z, U, MASK, OUT, x_b, x_h, x_n, z_b, z_h, z_n, o_b, o_h, o_n, w_head, w_d, w_e, m_b, m_n, H, N,
    D: tl.constexpr, D_V: tl.constexpr, SHRUNK: tl.constexpr, WITH_SIGN: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """X [diag(power)] W [+ sign(Z) diag(u)] of BLOCK_N tokens and BLOCK_V channels of one head, 0 on padding.

    W is [B H, D, Dv], power [B H, D] and u [B H, Dv], all float32.
    """
    tiles_n, tiles_v = tl.cdiv(N, BLOCK_N), tl.cdiv(D_V, BLOCK_V)
    tile, head = tl.program_id(0) % (tiles_n * tiles_v), (tl.program_id(0) // (tiles_n * tiles_v)).to(tl.int64)
    b, h = head // H, head % H
    n = tile // tiles_v * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tile % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V)
    token = _tokens(MASK + b * m_b, n, m_n, N, MASKED)
    out = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = _load(X + b * x_b + h * x_h, n, x_n, d, N, D, token).to(tl.float32)
        if SHRUNK:
            x *= tl.load(POWER + head * D + d, d < D, other=0.0)[None, :]
        inside = (d[:, None] < D) & (e[None, :] < D_V)
        w = tl.load(W + head * w_head + d[:, None] * w_d + e[None, :] * w_e, inside, other=0.0)
        out = tl.dot(x, rounded(w, PRECISION), out, input_precision=PRECISION)
    if WITH_SIGN:
        z = _load(Z + b * z_b + h * z_h, n, z_n, e, N, D_V, token)
        u = tl.load(U + head * D_V + e, e < D_V, other=0.0)
        out += tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, 0.0)) * u[None, :]
    where = OUT + b * o_b + h * o_h + n.to(tl.int64)[:, None] * o_n + e[None, :]
    out = tl.where(token[:, None], out, 0.0)
    tl.store(where, out.to(OUT.dtype.element_ty), (n[:, None] < N) & (e[None, :] < D_V))


def constants(dtype: torch.dtype, d: int, d_v: int, masked: bool) -> dict[str, Any]:
    """Of both kernels, for x of d channels and sums or results of d_v."""
    single = dtype == torch.float32  # products without tensor cores need more registers
    block_d, block_v = (max(16, triton.next_power_of_2(size)) for size in (d, d_v))
    return {
        "D": d, "D_V": d_v, "MASKED": masked, "PRECISION": precision(dtype), "BLOCK_N": 32 if single else 64,
        "BLOCK_D": min(block_d, 32 if single else 64), "BLOCK_V": min(block_v, 64),
        "num_warps": 8 if single else 4, "num_stages": 2,
    }  # fmt: skip


def _mask(padding: Tensor | None, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if padding is None:
        return x, (0, 0)  # never read
    padding = padding.view(torch.uint8).expand(x.shape[0], x.shape[2])
    return padding, padding.stride()


def _power_of(norm: Tensor) -> Tensor:
    """What the kernels' _power is."""
    bits = (253 - (norm.view(torch.int32) >> 23)).clamp(min=1) << 23
    return torch.where(norm > 1, bits.view(torch.float32), 1.0)


def _sums(x: Tensor, y: Tensor | None, padding: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """norm = |x|_1 over the tokens, [B, H, D], and diag(1 / max(norm, eps)) x^T y, [B, H, D, Dv], or nothing where y is
    None; both float32."""
    b, h, n, d = x.shape
    d_v = 1 if y is None else y.shape[3]
    parts = triton.cdiv(n, PART)
    norms = x.new_empty((parts, b, h, d), dtype=torch.float32)
    products = x.new_empty((parts, b, h, d, d_v) if y is not None else (0,), dtype=torch.float32)
    options = constants(x.dtype, d, d_v, padding is not None)
    tiles = triton.cdiv(d, options["BLOCK_D"]) * triton.cdiv(d_v, options["BLOCK_V"])
    mask, mask_strides = _mask(padding, x)
    other = x if y is None else y
    shrunk = x.dtype != torch.float16  # whose products stay far from float32's end
    with torch.cuda.device_of(x):
        sum_kernel[(tiles * b * h * parts,)](
            x, other, mask, norms, products, *x.stride()[:3], *other.stride()[:3], *mask_strides, h, b * h, n,
            PART=PART, SHRUNK=shrunk, WITH_PRODUCT=y is not None, **options,
        )  # fmt: skip
    norm = norms.sum(0)
    if y is None:
        return norm, products
    size = norm.clamp(min=eps) * _power_of(norms) if shrunk else norm.clamp(min=eps)  # [parts, B, H, D] or [B, H, D]
    return norm, products.div_(size[..., None]).sum(0)


def _apply(
    x: Tensor,
    w: Tensor,
    padding: Tensor | None,
    power: Tensor | None = None,
    z: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """x diag(power) w + sign(z) diag(u), [B, H, N, Dv], in memory [B, N, H, Dv]; w is [B, H, D, Dv] and may be
    transposed, power and u are [B, H, D] and [B, H, Dv]."""
    b, h, n, d = x.shape
    out = empty(x, (b, h, n, w.shape[3]))
    options = constants(x.dtype, d, w.shape[3], padding is not None)
    tiles = triton.cdiv(n, options["BLOCK_N"]) * triton.cdiv(w.shape[3], options["BLOCK_V"])
    mask, mask_strides = _mask(padding, x)
    w = w.flatten(0, 1)
    with torch.cuda.device_of(x):
        apply_kernel[(tiles * b * h,)](
            x, w, w if power is None else power, x if z is None else z, w if u is None else u, mask, out,
            *x.stride()[:3], *(x if z is None else z).stride()[:3], *out.stride()[:3], *w.stride(), *mask_strides,
            h, n, SHRUNK=power is not None, WITH_SIGN=z is not None, **options,
        )  # fmt: skip
    return out


def forward(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, eps: float) -> Tensor:
    """The operator l1_attention: [B, H, Nq, Dv], in memory [B, Nq, H, Dv]."""
    query, key, value = dense(query, key, value)
    if not query.numel() or not value.numel():
        return empty(query, (*query.shape[:3], value.shape[-1])).zero_()
    queries = padding if query.shape[2] == key.shape[2] else None  # the padding of self-attention's queries
    _, m = _sums(key, value, padding, eps)
    q_norm, _ = _sums(query, None, queries, eps)
    power = _power_of(q_norm)  # else 1 / norm could be subnormal
    return _apply(query, m / (q_norm.clamp(min=eps) * power)[..., None], queries, power)


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator l1_attention_backward."""
    if not query.numel() or not value.numel():
        grad_q, grad_k, grad_v = (empty(t, t.shape).zero_() for t in (query, key, value))
        return grad_q, grad_k, grad_v
    grad_out, query, key, value = dense(grad_out.to(query.dtype), query, key, value)
    queries = padding if query.shape[2] == key.shape[2] else None
    k_norm, m = _sums(key, value, padding, eps)
    q_norm, g = _sums(query, grad_out, queries, eps)
    k_size, q_size = (norm.clamp(min=eps) for norm in (k_norm, q_norm))
    slope = -(m * g).sum(-1)  # -c_j (G M^T)_jj
    u, w = (torch.where(norm >= eps, slope / size, 0.0) for norm, size in ((q_norm, q_size), (k_norm, k_size)))
    power = _power_of(k_norm)
    grad_q = _apply(grad_out, (m / q_size[..., None]).mT, queries, z=query, u=u)
    grad_k = _apply(value, (g / k_size[..., None]).mT, padding, z=key, u=w)
    grad_v = _apply(key, g / (k_size * power)[..., None], padding, power)
    return grad_q, grad_k, grad_v
