"""SimA's attention in Triton, in the fused order: O = Q C K^T V with C = diag(c),
c_j = 1 / (max(|q_:j|_1, eps) max(|k_:j|_1, eps)) (arXiv 2206.08898, eq. 4). With M = K^T V and G = Q^T dO,

    dQ = dO M^T C + sign(Q) diag(u),  dK = V G^T C + sign(K) diag(w),  dV = K C G,
    u_j = -c_j (G M^T)_jj / |q_:j|_1,  w_j likewise with k; zero where eps is larger than the norm.

One kernel sums products and norms over tokens, for parts of the tokens whose sums are then added up; one multiplies
every token by a [D, Dv] matrix. What is small, [B, H, D, Dv], is plain torch in float32. No atomics: the same inputs
give the same bits. Verified in Triton's interpreter and compiled for GPUs; not run or timed on one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from formix.ops.operators import dense, empty
from formix.ops.triton_pointwise import precision

PART = 1024  # tokens whose sums one program takes
TILES = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


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
def sum_kernel(
    X, Y, MASK, NORM, PRODUCT, x_b, x_h, x_n, y_b, y_h, y_n, m_b, m_n, H, HEADS, N, PART,
    D: tl.constexpr, D_V: tl.constexpr, WITH_PRODUCT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of one part of the tokens of one head, BLOCK_D of the norms sum_n |X_nd| and, if wanted, their rows of X^T Y.

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
    start = part.to(tl.int32) * PART
    for first in range(start, tl.minimum(start + PART, N), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        token = _tokens(MASK + b * m_b, n, m_n, N, MASKED)
        x = _load(X + b * x_b + h * x_h, n, x_n, d, N, D, token)
        norm += tl.sum(tl.abs(x.to(tl.float32)), 0)
        if WITH_PRODUCT:
            y = _load(Y + b * y_b + h * y_h, n, y_n, e, N, D_V, token)
            product = tl.dot(tl.trans(x), y, product, input_precision=PRECISION)
    row = part * HEADS + head
    if tile % tiles_v == 0:
        tl.store(NORM + row * D + d, norm, d < D)
    if WITH_PRODUCT:
        where = PRODUCT + (row * D + d[:, None]) * D_V + e[None, :]
        tl.store(where, product, (d[:, None] < D) & (e[None, :] < D_V))


@triton.jit
def apply_kernel(
    X, W, Z, U, MASK, OUT, x_b, x_h, x_n, z_b, z_h, z_n, o_b, o_h, o_n, w_head, w_d, w_e, m_b, m_n, H, N,
    D: tl.constexpr, D_V: tl.constexpr, WITH_SIGN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """X W [+ sign(Z) diag(u)] of BLOCK_N tokens and BLOCK_V channels of one head, 0 on padding.

    W is [B H, D, Dv] and u [B H, Dv], both float32.
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
        x = _load(X + b * x_b + h * x_h, n, x_n, d, N, D, token)
        inside = (d[:, None] < D) & (e[None, :] < D_V)
        w = tl.load(W + head * w_head + d[:, None] * w_d + e[None, :] * w_e, inside, other=0.0)
        out = tl.dot(x.to(tl.float32), w, out, input_precision=PRECISION)
    if WITH_SIGN:
        z = _load(Z + b * z_b + h * z_h, n, z_n, e, N, D_V, token)
        u = tl.load(U + head * D_V + e, e < D_V, other=0.0)
        out += tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, 0.0)) * u[None, :]
    where = OUT + b * o_b + h * o_h + n.to(tl.int64)[:, None] * o_n + e[None, :]
    out = tl.where(token[:, None], out, 0.0)
    tl.store(where, out.to(OUT.dtype.element_ty), (n[:, None] < N) & (e[None, :] < D_V))


def _constants(x: Tensor, d: int, d_v: int, padding: Tensor | None) -> dict[str, Any]:
    block_d, block_v = (min(64, max(16, triton.next_power_of_2(size))) for size in (d, d_v))
    return {
        "D": d, "D_V": d_v, "MASKED": padding is not None,
        "BLOCK_D": block_d, "BLOCK_V": block_v, **TILES,
    }  # fmt: skip


def _mask(padding: Tensor | None, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if padding is None:
        return x, (0, 0)  # never read
    padding = padding.view(torch.uint8).expand(x.shape[0], x.shape[2])
    return padding, padding.stride()


def _sums(x: Tensor, y: Tensor | None, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """|x|_1 over the tokens, [B, H, D], and x^T y, [B, H, D, Dv], or nothing where y is None; both float32."""
    b, h, n, d = x.shape
    d_v = 1 if y is None else y.shape[3]
    parts = max(1, triton.cdiv(n, PART))
    norm = x.new_empty((parts, b, h, d), dtype=torch.float32)
    product = x.new_empty((parts, b, h, d, d_v) if y is not None else (0,), dtype=torch.float32)
    constants = _constants(x, d, d_v, padding)
    tiles = triton.cdiv(d, constants["BLOCK_D"]) * triton.cdiv(d_v, constants["BLOCK_V"])
    mask, mask_strides = _mask(padding, x)
    other = x if y is None else y
    with torch.cuda.device_of(x):
        sum_kernel[(tiles * b * h * parts,)](
            x, other, mask, norm, product, *x.stride()[:3], *other.stride()[:3], *mask_strides, h, b * h, n, PART,
            WITH_PRODUCT=y is not None, PRECISION=precision(x.dtype), **constants,
        )  # fmt: skip
    return norm.sum(0), product.sum(0)


def _apply(x: Tensor, w: Tensor, padding: Tensor | None, z: Tensor | None = None, u: Tensor | None = None) -> Tensor:
    """x w + sign(z) u, [B, H, N, Dv], in memory [B, N, H, Dv]; w is [B, H, D, Dv] and may be transposed."""
    b, h, n, d = x.shape
    out = empty(x, (b, h, n, w.shape[3]))
    constants = _constants(x, d, w.shape[3], padding)
    tiles = triton.cdiv(n, constants["BLOCK_N"]) * triton.cdiv(w.shape[3], constants["BLOCK_V"])
    mask, mask_strides = _mask(padding, x)
    w = w.flatten(0, 1)
    with torch.cuda.device_of(x):
        apply_kernel[(tiles * b * h,)](
            x, w, x if z is None else z, w if u is None else u.contiguous(), mask, out, *x.stride()[:3],
            *(x if z is None else z).stride()[:3], *out.stride()[:3], *w.stride(), *mask_strides, h, n,
            WITH_SIGN=z is not None, PRECISION=precision(x.dtype), **constants,
        )  # fmt: skip
    return out


def forward(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, eps: float) -> Tensor:
    """The operator l1_attention: [B, H, Nq, Dv], in memory [B, Nq, H, Dv]."""
    query, key, value = dense(query, key, value)
    if not query.numel() or not value.numel():
        return empty(query, (*query.shape[:3], value.shape[-1])).zero_()
    queries = padding if query.shape[2] == key.shape[2] else None  # the padding of self-attention's queries
    k_norm, product = _sums(key, value, padding)
    q_norm, _ = _sums(query, None, queries)
    c_q, c_k = (1 / norm.clamp(min=eps)[..., None] for norm in (q_norm, k_norm))  # [B, H, D, 1]
    return _apply(query, c_q * (c_k * product), queries)


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator l1_attention_backward."""
    if not query.numel() or not value.numel():
        grad_q, grad_k, grad_v = (empty(t, t.shape).zero_() for t in (query, key, value))
        return grad_q, grad_k, grad_v
    grad_out, query, key, value = dense(grad_out.to(query.dtype), query, key, value)
    queries = padding if query.shape[2] == key.shape[2] else None
    k_norm, m = _sums(key, value, padding)
    q_norm, g = _sums(query, grad_out, queries)
    c_q, c_k = (1 / norm.clamp(min=eps)[..., None] for norm in (q_norm, k_norm))
    m, g = c_k * m, c_q * g  # [B, H, D, Dv]
    slope = -(m * g).sum(-1)  # -c_j (G M^T)_jj
    u, w = (torch.where(norm >= eps, slope / norm.clamp(min=eps), 0.0) for norm in (q_norm, k_norm))  # [B, H, D]
    grad_q = _apply(grad_out, (c_q * m).mT, queries, query, u)
    grad_k = _apply(value, (c_k * g).mT, padding, key, w)
    grad_v = _apply(key, c_k * g, padding)
    return grad_q, grad_k, grad_v
