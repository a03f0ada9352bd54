"""Pointwise attention in Triton. With s_ij = scale q_i . k_j (- log L_i) and f_i = L_i^-a (arXiv 2309.08586):

    O = f h(S) V,  dV = (f h(S))^T dO,  dS_ij = f_i scale h'(s_ij) (dO V^T)_ij,  dQ = dS K,  dK = dS^T Q.

Scores are computed again for the gradients. One program has a block of keys for dK and dV and another a block of
queries for dQ, and each sums alone: nothing of size Nq x Nk is stored, and the same inputs give the same bits. Tiles
that a causal mask hides are skipped. Verified in Triton's interpreter and compiled for GPUs; not run or timed on one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from formix.ops.masks import visible_mask
from formix.ops.operators import dense, empty


@triton.jit
def _weight(s, ACTIVATION: tl.constexpr):
    """h(s)."""
    if ACTIVATION == "relu":
        h = tl.where(s < 0, 0.0, s)  # a NaN stays one
    elif ACTIVATION == "relu2":
        h = tl.where(s < 0, 0.0, s * s)
    elif ACTIVATION == "relu6":
        h = tl.where(s < 0, 0.0, tl.where(s > 6, 6.0, s))
    elif ACTIVATION == "gelu":  # (1 + tanh u) / 2 = sigmoid(2 u)
        h = s * tl.sigmoid(1.5957691216057308 * (s + 0.044715 * s * s * s))
    elif ACTIVATION == "gelu_erf":
        h = 0.5 * s * (1 + tl.erf(0.7071067811865476 * s))
    elif ACTIVATION == "softplus":
        t = tl.exp(-tl.abs(s))
        u = 1 + t
        log1p = tl.where(u == 1, t, tl.log(u) * t / tl.where(u == 1, 1.0, u - 1))  # the rounding of 1 + t cancels
        h = tl.where(s < 0, 0.0, s) + log1p
    elif ACTIVATION == "identity":
        h = s
    else:
        tl.static_assert(ACTIVATION == "sigmoid" or ACTIVATION == "sigmoid_bias")
        h = tl.sigmoid(s)
    return h


@triton.jit
def _slope(s, ACTIVATION: tl.constexpr):
    """h'(s)."""
    if ACTIVATION == "relu":
        g = tl.where(s > 0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        g = tl.where(s > 0, 2 * s, 0.0)
    elif ACTIVATION == "relu6":
        g = tl.where((s > 0) & (s < 6), 1.0, 0.0)
    elif ACTIVATION == "gelu":
        p = tl.sigmoid(1.5957691216057308 * (s + 0.044715 * s * s * s))
        g = p + s * p * (1 - p) * 1.5957691216057308 * (1 + 0.134145 * s * s)
    elif ACTIVATION == "gelu_erf":
        g = 0.5 * (1 + tl.erf(0.7071067811865476 * s)) + s * 0.3989422804014327 * tl.exp(-0.5 * s * s)
    elif ACTIVATION == "softplus":
        g = tl.sigmoid(s)
    elif ACTIVATION == "identity":
        g = tl.full(s.shape, 1.0, tl.float32)
    else:
        p = tl.sigmoid(s)
        g = p * (1 - p)
    return g


@triton.jit
def _load(start, tokens, stride, N, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of these tokens, [tokens, BLOCK], 0 past the N-th token and past the head's SIZE channels."""
    c = tl.arange(0, BLOCK)[None, :]
    return tl.load(start + tokens.to(tl.int64)[:, None] * stride + c, (tokens[:, None] < N) & (c < SIZE), other=0.0)


@triton.jit
def _store(start, tokens, stride, N, x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)[None, :]
    where = start + tokens.to(tl.int64)[:, None] * stride + c
    tl.store(where, x.to(start.dtype.element_ty), (tokens[:, None] < N) & (c < SIZE))


@triton.jit
def _seen(i, j, N_Q, N_K, mask, stride_i, stride_j, CAUSAL: tl.constexpr, MASK_OF: tl.constexpr):
    """Whether query i sees key j; i and j broadcast."""
    seen = (i < N_Q) & (j < N_K)
    if CAUSAL:
        seen = seen & (j <= i)
    if MASK_OF == "keys":
        seen = seen & (tl.load(mask + j.to(tl.int64) * stride_j, j < N_K, other=0) != 0)
    elif MASK_OF == "pairs":
        seen = seen & (tl.load(mask + i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j, seen, other=0) != 0)
    return seen


@triton.jit
def _number(numbers, i, N_Q, number, UNIFORM: tl.constexpr):
    """What the length makes of rows i: L^-a, or log L where it is a bias."""
    if UNIFORM:  # noqa: SIM108
        n = tl.full(i.shape, 1.0, tl.float32) * number
    else:
        n = tl.load(numbers + i, i < N_Q, other=0.0)
    return n


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """To the nearest number of tf32 where products are of these: tensor cores cut the last 13 bits off, so that sums
    of positive weights would come out too small."""
    if PRECISION == "tf32":
        nearest = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), nearest, x)
    return x


@triton.jit
def _product(x, y, total, PRECISION: tl.constexpr):
    """total + x y for weights x in float32, rounded to y's type for bfloat16 alone: float16 lacks the range."""
    if y.dtype == tl.bfloat16:
        total = tl.dot(x.to(tl.bfloat16), y, total)
    else:
        total = tl.dot(rounded(x, PRECISION), y.to(tl.float32), total, input_precision=PRECISION)
    return total


VARYING = ["N_Q", "N_K", "n_b", "n_h"]  # with the length of a sequence: a new one compiles nothing


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    Q, K, V, OUT, MASK, NUMBERS,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, m_b, m_h, m_i, m_j, n_b, n_h,
    scale, number, H, GROUP, N_Q, N_K, D: tl.constexpr, D_V: tl.constexpr,
    ACTIVATION: tl.constexpr, CAUSAL: tl.constexpr, MASK_OF: tl.constexpr, UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """O of OWN queries of one head."""
    tiles = tl.cdiv(N_Q, OWN)
    tile, head = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles  # causal: those with most work first
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i = tile * OWN + tl.arange(0, OWN)
    q = _load(Q + b * q_b + h * q_h, i, q_n, N_Q, D, BLOCK_D)
    n = _number(NUMBERS + b * n_b + h * n_h, i, N_Q, number, UNIFORM)
    out = tl.zeros([OWN, BLOCK_V], tl.float32)
    last = N_K
    if CAUSAL:
        last = tl.minimum(N_K, (tile + 1) * OWN)
    for first in range(0, last, STEP):
        j = first + tl.arange(0, STEP)
        k = _load(K + b * k_b + h // GROUP * k_h, j, k_n, N_K, D, BLOCK_D)
        v = _load(V + b * v_b + h // GROUP * v_h, j, v_n, N_K, D_V, BLOCK_V)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if ACTIVATION == "sigmoid_bias":
            s -= n[:, None]
        seen = _seen(i[:, None], j[None, :], N_Q, N_K, MASK + b * m_b + h * m_h, m_i, m_j, CAUSAL, MASK_OF)
        out = _product(tl.where(seen, _weight(s, ACTIVATION), 0.0), v, out, PRECISION)
    if ACTIVATION != "sigmoid_bias":
        out *= n[:, None]
    _store(OUT + b * o_b + h * o_h, i, o_n, N_Q, out, D_V, BLOCK_V)


@triton.jit(do_not_specialize=VARYING)
def key_gradient_kernel(
    Q, K, V, DO, DK, DV, MASK, NUMBERS,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    m_b, m_h, m_i, m_j, n_b, n_h,
    scale, number, H, GROUP, N_Q, N_K, D: tl.constexpr, D_V: tl.constexpr,
    ACTIVATION: tl.constexpr, CAUSAL: tl.constexpr, MASK_OF: tl.constexpr, UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dK and dV of OWN keys of one head, summed over the GROUP of query heads that read it."""
    tiles = tl.cdiv(N_K, OWN)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h_k = (head // (H // GROUP)).to(tl.int64), (head % (H // GROUP)).to(tl.int64)
    j = tile * OWN + tl.arange(0, OWN)
    k = _load(K + b * k_b + h_k * k_h, j, k_n, N_K, D, BLOCK_D)
    v = _load(V + b * v_b + h_k * v_h, j, v_n, N_K, D_V, BLOCK_V)
    dk = tl.zeros([OWN, BLOCK_D], tl.float32)
    dv = tl.zeros([OWN, BLOCK_V], tl.float32)
    start = 0
    if CAUSAL:
        start = tile * OWN // STEP * STEP
    for member in range(0, GROUP):
        h = h_k * GROUP + member
        for first in range(start, N_Q, STEP):
            i = first + tl.arange(0, STEP)
            q = _load(Q + b * q_b + h * q_h, i, q_n, N_Q, D, BLOCK_D)
            do = _load(DO + b * o_b + h * o_h, i, o_n, N_Q, D_V, BLOCK_V)
            n = _number(NUMBERS + b * n_b + h * n_h, i, N_Q, number, UNIFORM)[None, :]
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # [keys, queries]
            f = n
            if ACTIVATION == "sigmoid_bias":
                s -= n
                f = 1.0
            seen = _seen(i[None, :], j[:, None], N_Q, N_K, MASK + b * m_b + h * m_h, m_i, m_j, CAUSAL, MASK_OF)
            dv = _product(tl.where(seen, _weight(s, ACTIVATION) * f, 0.0), do, dv, PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            dk = _product(tl.where(seen, _slope(s, ACTIVATION) * dp * (f * scale), 0.0), q, dk, PRECISION)
    _store(DK + b * dk_b + h_k * dk_h, j, dk_n, N_K, dk, D, BLOCK_D)
    _store(DV + b * dv_b + h_k * dv_h, j, dv_n, N_K, dv, D_V, BLOCK_V)


@triton.jit(do_not_specialize=VARYING)
def query_gradient_kernel(
    Q, K, V, DO, DQ, MASK, NUMBERS,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, dq_b, dq_h, dq_n, m_b, m_h, m_i, m_j, n_b, n_h,
    scale, number, H, GROUP, N_Q, N_K, D: tl.constexpr, D_V: tl.constexpr,
    ACTIVATION: tl.constexpr, CAUSAL: tl.constexpr, MASK_OF: tl.constexpr, UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dQ of OWN queries of one head."""
    tiles = tl.cdiv(N_Q, OWN)
    tile, head = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles  # causal: those with most work first
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i = tile * OWN + tl.arange(0, OWN)
    q = _load(Q + b * q_b + h * q_h, i, q_n, N_Q, D, BLOCK_D)
    do = _load(DO + b * o_b + h * o_h, i, o_n, N_Q, D_V, BLOCK_V)
    n = _number(NUMBERS + b * n_b + h * n_h, i, N_Q, number, UNIFORM)
    dq = tl.zeros([OWN, BLOCK_D], tl.float32)
    last = N_K
    if CAUSAL:
        last = tl.minimum(N_K, (tile + 1) * OWN)
    for first in range(0, last, STEP):
        j = first + tl.arange(0, STEP)
        k = _load(K + b * k_b + h // GROUP * k_h, j, k_n, N_K, D, BLOCK_D)
        v = _load(V + b * v_b + h // GROUP * v_h, j, v_n, N_K, D_V, BLOCK_V)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if ACTIVATION == "sigmoid_bias":
            s -= n[:, None]
        seen = _seen(i[:, None], j[None, :], N_Q, N_K, MASK + b * m_b + h * m_h, m_i, m_j, CAUSAL, MASK_OF)
        ds = _slope(s, ACTIVATION) * tl.dot(do, tl.trans(v), input_precision=PRECISION) * scale
        if ACTIVATION != "sigmoid_bias":
            ds *= n[:, None]
        dq = _product(tl.where(seen, ds, 0.0), k, dq, PRECISION)
    _store(DQ + b * dq_b + h * dq_h, i, dq_n, N_Q, dq, D, BLOCK_D)


def precision(dtype: torch.dtype) -> str:
    """Of products of float32: exact for float32 inputs; float16 inputs are exact in NVIDIA's tf32."""
    return "ieee" if dtype == torch.float32 or torch.version.hip else "tf32"


def blocks(dtype: torch.dtype, d: int, d_v: int, backward: bool) -> dict[str, int]:
    """Tiles: OWN tokens of a program, STEP that it goes through at a time; 16 is the least that tl.dot takes.

    As large as registers allow (ptxas puts at most 256 bytes of a thread's into memory), and within the 99 KB of shared
    memory of consumer GPUs.
    """
    block_d, block_v = (max(16, triton.next_power_of_2(size)) for size in (d, d_v))
    channels = max(block_d, block_v)
    if dtype == torch.float32:  # products without tensor cores
        own, step = (32, 32) if channels <= 64 else (32, 16) if channels <= 128 else (16, 16)
    else:
        own, step = (32, 32) if channels > 128 else (64, 32) if backward else (64, 64)
    light = not backward and channels <= 64
    return {
        "OWN": own, "STEP": step, "BLOCK_D": block_d, "BLOCK_V": block_v,
        "num_warps": 4 if light else 8, "num_stages": 1 if backward else 2,
    }  # fmt: skip


def _lengths(mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor:
    """How many keys each row sees, broadcastable to [B, H, Nq]."""
    n_q, n_k = query.shape[2], key.shape[2]
    if mask is None:
        return torch.arange(1, n_q + 1, device=query.device).clamp(max=n_k)
    for dimension, stride in enumerate(mask.stride()):
        if stride == 0:  # expanded
            mask = mask.narrow(dimension, 0, 1)
    if mask.dim() < 2:
        mask = mask.reshape(1, -1)
    if is_causal and mask.shape[-2] == 1:  # of keys alone: no [Nq, Nk] of them
        rows = torch.arange(n_q, device=mask.device).clamp(max=n_k - 1)
        return mask.expand(*mask.shape[:-1], n_k).cumsum(-1)[..., 0, :][..., rows]
    seen = visible_mask(mask, is_causal, query, key)
    assert seen is not None
    return seen.expand(*seen.shape[:-1], n_k).sum(-1)


class _Call:
    """What the kernels of one attention have in common."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, activation: str, length_exponent: float,
        length: int | None, is_causal: bool, scale: float, backward: bool,
    ) -> None:  # fmt: skip
        b, h, n_q, d = query.shape
        h_kv, n_k, d_v = value.shape[1:]
        self.b, self.h, self.h_kv, self.n_q, self.n_k = b, h, h_kv, n_q, n_k
        uniform = length is not None or (mask is None and not is_causal)
        number, numbers, strides = 0.0, query, [0, 0]
        if uniform:
            fixed = n_k if length is None else length
            number = math.log(fixed) if activation == "sigmoid_bias" else float(fixed) ** -length_exponent
        else:
            lengths = _lengths(mask, is_causal, query, key).clamp(min=1).double()
            rows = lengths.log() if activation == "sigmoid_bias" else lengths**-length_exponent
            numbers = rows.float().contiguous()
            numbers = numbers.expand(b, h, n_q)
            if numbers.stride(2) != 1:
                numbers = numbers.contiguous()
            strides = list(numbers.stride()[:2])
        seen = query if mask is None else mask.view(torch.uint8).expand(b, h, n_q, n_k)
        self.extra = (seen, numbers)  # pointers that are not read stand for what is not there
        self.strides = ((0,) * 4 if mask is None else seen.stride()) + tuple(strides)
        mask_of = "nothing" if mask is None else "keys" if seen.stride(2) == 0 else "pairs"
        self.rest = (scale, number, h, h // h_kv, n_q, n_k)
        self.constants: dict[str, Any] = {
            "D": d, "D_V": d_v, "ACTIVATION": activation, "CAUSAL": is_causal, "MASK_OF": mask_of,
            "UNIFORM": uniform, "PRECISION": precision(query.dtype), **blocks(query.dtype, d, d_v, backward),
        }  # fmt: skip

    def run(self, kernel: Any, tokens: int, heads: int, *tensors: Tensor) -> None:
        """`tokens` and `heads` are those that the programs share among themselves."""
        grid = (triton.cdiv(tokens, self.constants["OWN"]) * self.b * heads,)
        strides = (stride for t in tensors for stride in t.stride()[:3])
        with torch.cuda.device_of(tensors[0]):
            kernel[grid](*tensors, *self.extra, *strides, *self.strides, *self.rest, **self.constants)


def forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    """The operator pointwise_attention: [B, H, Nq, Dv], in memory [B, Nq, H, Dv]."""
    query, key, value = dense(query, key, value)
    out = empty(query, (*query.shape[:3], value.shape[-1]))
    if value.shape[2] == 0:
        return out.zero_()
    if out.numel():
        call = _Call(query, key, value, *options, backward=False)  # type: ignore[misc]
        call.run(forward_kernel, call.n_q, call.h, query, key, value, out)
    return out


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator pointwise_attention_backward."""
    grad_q, grad_k, grad_v = (empty(t, t.shape) for t in (query, key, value))
    if query.numel() and value.numel():
        grad_out, query, key, value = dense(grad_out.to(query.dtype), query, key, value)
        call = _Call(query, key, value, *options, backward=True)  # type: ignore[misc]
        inputs = query, key, value, grad_out
        call.run(key_gradient_kernel, call.n_k, call.h_kv, *inputs, grad_k, grad_v)
        call.run(query_gradient_kernel, call.n_q, call.h, *inputs, grad_q)
    else:
        for gradient in (grad_q, grad_k, grad_v):
            gradient.zero_()
    return grad_q, grad_k, grad_v
