// SimA (arXiv 2206.08898): O = Q diag(c) K^T V with c_j = 1 / (max(|q_:j|_1, eps) max(|k_:j|_1, eps)).
//
// K and V are read once: while a piece of K is in cache for K^T V its column sums are taken too. The D x Dv product is then
// scaled by c and applied to Q. Everything is summed in fp32; where there are bf16 instructions, c K^T V is rounded to bf16
// for the second product of bf16 inputs.
//
// With M = K^T V, G = Q^T dO and C = diag(c), the gradients are
//   dQ = dO M^T C + sign(Q) diag(u),  dK = V G^T C + sign(K) diag(w),  dV = K C G,
//   u_j = -c_j (G M^T)_jj / |q_:j|_1,  w_j likewise with k; zero where eps is larger than the norm.
#pragma once
#include <stdlib.h>

#include "pack.h"
#include "parts.h"
#include "scratch.h"

#if defined(FORMIX_TILES)
constexpr int TOKENS = 64;  // rows of a piece
#else
constexpr int TOKENS = 48;
#endif

template <class T> struct L1Task {  // one (batch, head)
  using unit = typename T::unit;
  static constexpr bool pairs = T::per_unit == 2;
  const FormixL1 &p;
  const long b, h;
  const int D, Dv, Dp, Dvp;  // ..p: padded to vectors
  Padding keys, queries;
  // Sums over tokens, of one part of them or all.
  float *M, *G, *q_norm, *k_norm;  // [D][Dvp], [D][Dvp], [Dp], [Dp]
  // What follows from them.
  float *scaled, *u, *w;                // [max(D, Dv)][max(Dp, Dvp)], [Dp], [Dp]
  unit *CM, *CG, *MtC, *GtC;            // [units of D][Dvp] twice, [units of Dv][Dp] twice
  unit *left, *right;                   // [TOKENS][LDA] each: a piece of two inputs
  float *rows, *values;                 // [TOKENS][LDA] each: a piece of the output, and of an input in floats
  unit *turned;                         // with tiles: `left` transposed, [Dp or Dvp][LDA]

  static long sums_size(const FormixL1 &p) { return 2 * (p.D * round_up(p.Dv, W) + round_up(p.D, W)); }
  static long memory_size(const FormixL1 &p) {
    const long Dp = round_up(p.D, W), Dvp = round_up(p.Dv, W);
    return Dp * Dvp + 2 * Dp + 2 * p.D * Dvp + 2 * p.Dv * Dp + 4L * TOKENS * LDA +
           (T::tiles ? greatest(Dp, Dvp) * LDA : 0);
  }
  L1Task(const FormixL1 &p, long b, long h, float *sums, float *memory)
      : p(p), b(b), h(h), D(p.D), Dv(p.Dv), Dp(round_up(D, W)), Dvp(round_up(Dv, W)) {
    if (p.mask.data) keys = {p.mask.data + b * p.mask.batch, p.mask.key};
    if (p.mask_queries) queries = keys;
    M = sums, G = M + D * Dvp, q_norm = G + D * Dvp, k_norm = q_norm + Dp;
    left = (unit *)memory, right = left + TOKENS * LDA, rows = memory + 2 * TOKENS * LDA, values = rows + TOKENS * LDA;
    scaled = values + TOKENS * LDA, u = scaled + Dp * Dvp, w = u + Dp;
    CM = (unit *)(w + Dp), CG = CM + D * Dvp, MtC = CG + D * Dvp, GtC = MtC + Dv * Dp, turned = GtC + Dv * Dp;
  }

  void read_rows(const FormixTensor &t, long first, int n, int channels, unit *to) const {
    const int units = (channels + T::per_unit - 1) / T::per_unit;
    for (int i = 0; i < n; i++)
      read_units<T>(row_of(t, p.type, b, h, first + i), p.type, channels, round_up(units, W), to + i * LDA);
  }
  void read_columns(const FormixTensor &t, long first, int n, int channels, const Padding &padding, unit *to) const {
    pack_rows<T>(t, p.type, b, h, first, n, channels, to, LDA, padding);
  }
  Prefetch prefetch(const FormixTensor &t, long first, long end, int channels) const {
    return {t, p.type, b, h, first, least((long)TOKENS, end - first), channels};
  }
  void write(const FormixTensor &t, long first, int n, int channels, const Padding &padding) const {
    alignas(64) static const float zeros[256] = {};
    for (int i = 0; i < n; i++)
      write_row((void *)row_of(t, p.type, b, h, first + i), p.type, channels,
                padding.masked(first + i) ? zeros : rows + i * LDA);
  }

  // sums[j] += |x_:j| over the n tokens that read_columns has laid out
  static void add_absolute(const unit *x, int n, int padded, float *sums) {
    const int units = (n + T::per_unit - 1) / T::per_unit;
    for (int d = 0; d < padded; d += W) {
      vf even = vf{}, odd = vf{};
      for (int i = 0; i < units; i++) {
        vu value = load((const uint32_t *)x + i * LDA + d);
        if constexpr (pairs)
          even += vabs((vf)(value << 16)), odd += vabs((vf)(value & 0xffff0000u));
        else if (i & 1)
          odd += vabs((vf)value);
        else
          even += vabs((vf)value);
      }
      store(sums + d, load(sums + d) + (even + odd));
    }
  }
  static constexpr int STEP = T::tiles ? 32 : MR;  // rows that a product takes at once
  // C [left channels][right padded] += X^T Y over n tokens, X in `left`, Y in `right`; memory that is needed next is asked
  // for meanwhile
  void add_outer(int channels, int columns, int n, float *c, Prefetch first, Prefetch second, Prefetch third) const {
    const int units = (n + T::per_unit - 1) / T::per_unit, ldc = round_up(columns, W);
    if constexpr (T::tiles) transpose_units((const uint32_t *)left, LDA, units, round_up(channels, W), (uint32_t *)turned);
    for (int d = 0; d < columns; d += NR)
      for (int i = 0; i < channels; i += STEP) {
        const int m = least(STEP, channels - i);
        if constexpr (T::tiles)
          gemm_panel<T, false, ADD>(m, columns - d, units, turned + i * LDA, 0, right + d, LDA, c + i * ldc + d, ldc);
        else
          gemm_panel<T, true, ADD>(m, columns - d, units, left + i, LDA, right + d, LDA, c + i * ldc + d, ldc);
        first.some(TOKENS / 2 * STEP / MR), second.some(TOKENS / 2 * STEP / MR), third.some(TOKENS / 2 * STEP / MR);
      }
  }
  // rows[n][columns] = left[n][channels] B
  void multiply(int n, int channels, const unit *B, int columns, Prefetch soon) const {
    const int units = (channels + T::per_unit - 1) / T::per_unit;
    for (int d = 0; d < columns; d += NR)
      for (int i = 0; i < n; i += STEP) {
        gemm_panel<T, false, SET>(least(STEP, n - i), columns - d, units, left + i * LDA, 0, B + d, round_up(columns, W),
                                  rows + i * LDA + d, LDA);
        soon.some(TOKENS * STEP / MR);
      }
  }

  // The sums over query tokens q0 .. q1 and key tokens k0 .. k1.
  void sum(long q0, long q1, long k0, long k1, bool backward) const {
    memset(M, 0, sizeof(float) * sums_size(p));
    for (long i = k0; i < k1; i += TOKENS) {
      const int n = least((long)TOKENS, k1 - i);
      read_columns(p.k, i, n, D, keys, left);
      read_columns(p.v, i, n, Dv, keys, right);
      add_absolute(left, n, Dp, k_norm);
      add_outer(D, Dv, n, M, prefetch(p.k, i + TOKENS, k1, D), prefetch(p.v, i + TOKENS, k1, Dv),
                prefetch(p.q, q0 + i - k0, q1, D));
    }
    for (long i = q0; i < q1; i += TOKENS) {
      const int n = least((long)TOKENS, q1 - i);
      read_columns(p.q, i, n, D, queries, left);
      add_absolute(left, n, Dp, q_norm);
      if (!backward) continue;
      read_columns(p.grad_out, i, n, Dv, queries, right);
      add_outer(D, Dv, n, G, prefetch(p.q, i + TOKENS, q1, D), prefetch(p.grad_out, i + TOKENS, q1, Dv),
                prefetch(p.q, q1, q1, D));
    }
  }

  // c, then the small matrices that the tokens are multiplied by.
  void scale_sums(bool backward) const {
    const float eps = (float)p.eps;
    alignas(64) float c[256], dot[256];
    for (int j = 0; j < D; j++) {
      c[j] = 1.0f / (greatest(eps, q_norm[j]) * greatest(eps, k_norm[j]));
      if (!backward) continue;
      float sum = 0;
      for (int d = 0; d < Dv; d++) sum += M[j * Dvp + d] * G[j * Dvp + d];
      dot[j] = sum;
    }
    auto scale_into = [&](const float *from, unit *to) {  // C X
      for (int j = 0; j < D; j++)
        for (int d = 0; d < Dvp; d += W) store(scaled + j * Dvp + d, load(from + j * Dvp + d) * c[j]);
      pack_matrix<T>(scaled, D, Dvp, to);
    };
    auto transpose_into = [&](const float *from, unit *to) {  // X^T C
      for (int d = 0; d < Dv; d++)
        for (int j = 0; j < Dp; j++) scaled[d * Dp + j] = j < D ? from[j * Dvp + d] * c[j] : 0.0f;
      pack_matrix<T>(scaled, Dv, Dp, to);
    };
    if (!backward) return scale_into(M, CM);
    scale_into(G, CG);
    transpose_into(M, MtC);
    transpose_into(G, GtC);
    for (int j = 0; j < Dp; j++) {
      u[j] = j >= D || q_norm[j] < eps ? 0.0f : -c[j] * dot[j] / q_norm[j];
      w[j] = j >= D || k_norm[j] < eps ? 0.0f : -c[j] * dot[j] / k_norm[j];
    }
  }

  // rows += sign(x) slope: what the norm over the tokens adds to a gradient
  void add_sign(const FormixTensor &x, long first, int n, const float *slope) const {
    for (int i = 0; i < n; i++) {
      read_row(row_of(x, p.type, b, h, first + i), p.type, D, Dp, values);
      for (int d = 0; d < Dp; d += W) {
        vf value = load(values + d), s = load(slope + d);
        vf signed_slope = (vf)((vu)s ^ ((vu)value & 0x80000000u));
        store(rows + i * LDA + d, load(rows + i * LDA + d) + keep(value != 0.0f, signed_slope));
      }
    }
  }

  void forward(long q0, long q1) const {
    for (long i = q0; i < q1; i += TOKENS) {
      const int n = least((long)TOKENS, q1 - i);
      read_rows(p.q, i, n, D, left);
      multiply(n, D, CM, Dv, prefetch(p.out, i, q1, Dv));
      write(p.out, i, n, Dv, queries);
    }
  }
  void backward(long q0, long q1, long k0, long k1) const {
    for (long i = q0; i < q1; i += TOKENS) {
      const int n = least((long)TOKENS, q1 - i);
      read_rows(p.grad_out, i, n, Dv, left);
      multiply(n, Dv, MtC, D, prefetch(p.grad_q, i, q1, D));
      add_sign(p.q, i, n, u);
      write(p.grad_q, i, n, D, queries);
    }
    for (long i = k0; i < k1; i += TOKENS) {
      const int n = least((long)TOKENS, k1 - i);
      read_rows(p.k, i, n, D, left);
      multiply(n, D, CG, Dv, prefetch(p.grad_v, i, k1, Dv));
      write(p.grad_v, i, n, Dv, keys);
      read_rows(p.v, i, n, Dv, left);
      multiply(n, Dv, GtC, D, prefetch(p.grad_k, i, k1, D));
      add_sign(p.k, i, n, w);
      write(p.grad_k, i, n, D, keys);
    }
  }
};

// Tokens first .. of part i of `parts`, whole pieces.
static INLINE long token_of(long tokens, long part, long parts) {
  const long pieces = (tokens + TOKENS - 1) / TOKENS;
  return least(tokens, pieces * part / parts * TOKENS);
}

template <class T, bool BACKWARD> static int l1(const FormixL1 &p) {
  const long pairs = p.B * p.H, longest = greatest(p.Nq, p.Nk);
  const long parts = parts_for(pairs, p.threads, (longest + 4 * TOKENS - 1) / (4 * TOKENS), false);
  const long sums_size = round_up(L1Task<T>::sums_size(p), 16), memory_size = L1Task<T>::memory_size(p);
  auto run = [&](L1Task<T> &t, long part) {
    const long q0 = token_of(p.Nq, part, parts), q1 = token_of(p.Nq, part + 1, parts);
    if (BACKWARD)
      t.backward(q0, q1, token_of(p.Nk, part, parts), token_of(p.Nk, part + 1, parts));
    else
      t.forward(q0, q1);
  };
  int failed = 0;
  if (parts == 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads) reduction(| : failed)
    for (long pair = 0; pair < pairs; pair++) {
      auto *memory = (float *)formix::scratch(4 * (sums_size + memory_size));
      if (!memory) { failed = 1; continue; }
      typename T::session session;
      (void)session;
      L1Task<T> t(p, pair / p.H, pair % p.H, memory, memory + sums_size);
      t.sum(0, p.Nq, 0, p.Nk, BACKWARD);
      t.scale_sums(BACKWARD);
      run(t, 0);
    }
    return failed;
  }
  auto *sums = (float *)malloc(4 * pairs * parts * sums_size);
  if (!sums) return 1;
#pragma omp parallel num_threads(p.threads) reduction(| : failed)
  {
    typename T::session session;
    (void)session;
    auto *memory = (float *)formix::scratch(4 * memory_size);
    if (!memory) failed = 1;
#pragma omp for schedule(dynamic, 1)
    for (long task = 0; task < pairs * parts; task++) {
      const long pair = task / parts, part = task % parts;
      if (memory)
        L1Task<T>(p, pair / p.H, pair % p.H, sums + task * sums_size, memory)
            .sum(token_of(p.Nq, part, parts), token_of(p.Nq, part + 1, parts), token_of(p.Nk, part, parts),
                 token_of(p.Nk, part + 1, parts), BACKWARD);
    }
#pragma omp for schedule(dynamic, 1)
    for (long pair = 0; pair < pairs; pair++) {  // add the parts up in the first one
      float *total = sums + pair * parts * sums_size;
      for (long part = 1; part < parts; part++)
        for (long i = 0; i < L1Task<T>::sums_size(p); i++) total[i] += total[part * sums_size + i];
    }
#pragma omp for schedule(dynamic, 1)
    for (long task = 0; task < pairs * parts; task++) {
      const long pair = task / parts;
      if (!memory) continue;
      L1Task<T> t(p, pair / p.H, pair % p.H, sums + pair * parts * sums_size, memory);
      t.scale_sums(BACKWARD);
      run(t, task % parts);
    }
  }
  free(sums);
  return failed;
}
