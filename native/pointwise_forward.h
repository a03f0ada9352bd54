// O_i = L_i^-a sum_j h(scale q_i . k_j) v_j (arXiv 2309.08586), without a tensor of scores.
//
// There is no row maximum or sum to carry, so a block of scores goes through h straight into the second product.
// Loops: keys in blocks that fit L2, packed once; inside, ROWS queries at a time; inside, score blocks of ROWS x KEYS.
#pragma once
#include "activation.h"
#include "mask.h"
#include "pack.h"
#include "parts.h"
#include "scratch.h"

#if defined(FORMIX_TILES)
constexpr int ROWS = 64;            // query rows of a score block
#else
constexpr int ROWS = 48;
#endif
constexpr long L2_BUDGET = 640000;  // bytes of packed keys and values

// Gives `put` the weights h(scale * s + bias) of one row of n scores.
template <int ACT, class Put> static INLINE void weigh(const float *s, int n, float scale, float bias, Put put) {
  for (int j = 0; j < n; j += W) {
    vf unused;
    put(j, activation<ACT, false>(load(s + j) * scale + bias, unused));
  }
}

// False: no memory.
template <class T> static bool pointwise_forward_task(const FormixPointwise &p, long b, long g, long part, long parts) {
  using unit = typename T::unit;
  const int D = p.D, Dv = p.Dv, Dvp = round_up(Dv, W), units = (D + T::per_unit - 1) / T::per_unit;
  const long group = p.Hq / p.Hkv, blocks_per_head = (p.Nq + ROWS - 1) / ROWS, blocks = group * blocks_per_head;
  const long first_block = blocks * part / parts, last_block = blocks * (part + 1) / parts;
  const long block_keys = greatest(1L, L2_BUDGET / ((units + (long)Dvp / T::per_unit) * 4 * KEYS)) * KEYS;
  const bool one_block = p.Nk <= block_keys;
  const long keys_held = one_block ? round_up(p.Nk, NR) : block_keys;

  // relu and the identity commute with the scale, which is applied at the end then. Floats are done after the first
  // product: its store knows relu.
  const bool in_place = p.activation == FORMIX_RELU && p.scale >= 0, linear = in_place || p.activation == FORMIX_IDENTITY;
  const float scale = linear ? 1.0f : (float)p.scale, after = linear ? (float)p.scale : 1.0f;
  const bool done = linear && T::per_unit == 1;

  // Working memory.
  const long held_rows = one_block ? ROWS : (last_block - first_block) * ROWS;
  const long size_k = keys_held * units, size_v = (keys_held / T::per_unit + 1) * Dvp, size_q = ROWS * LDA,
             size_s = ROWS * LDA, size_p = T::per_unit == 1 ? 0 : ROWS * LDA, size_o = held_rows * Dvp,
             size_rows = (last_block - first_block) * ROWS;
  auto *memory = (float *)formix::scratch(4 * (size_k + size_v + size_q + size_s + size_p + size_o + 2 * size_rows + 256));
  if (!memory) return false;
  auto take = [&](long n) { float *r = memory; memory += round_up(n, 16); return r; };
  unit *K = (unit *)take(size_k), *V = (unit *)take(size_v), *Q = (unit *)take(size_q);
  float *S = take(size_s), *P = take(size_p), *O = take(size_o), *factor = take(size_rows), *bias = take(size_rows);
  const unit *weights = T::per_unit == 1 ? (unit *)S : (unit *)P;
  typename T::session session;
  (void)session;

  auto head_of = [&](long block) { return g * group + block / blocks_per_head; };
  for (long block = first_block; block < last_block;) {
    long next = least(last_block, (block / blocks_per_head + 1) * blocks_per_head), row = block % blocks_per_head * ROWS;
    Visibility(p, b, head_of(block))
        .rows(p, row, least((next - block) * ROWS, p.Nq - row), factor + (block - first_block) * ROWS,
              bias + (block - first_block) * ROWS);
    block = next;
  }

  // No row of this part sees a key from here on.
  const bool one_head = first_block / blocks_per_head == (last_block - 1) / blocks_per_head;
  const long last_key = p.causal && one_head ? least(p.Nk, ((last_block - 1) % blocks_per_head + 1) * ROWS) : p.Nk;

  for (long k0 = 0; k0 < p.Nk; k0 += block_keys) {
    const long k1 = least(p.Nk, k0 + block_keys);
    if (k0 < last_key) {
      pack_transposed<T>(p.k, p.type, b, g, k0, k1 - k0, D, K);
      pack_rows<T>(p.v, p.type, b, g, k0, k1 - k0, Dv, V);
    }
    long seen_head = -1;
    Visibility see(p, b, head_of(first_block));
    for (long block = first_block; block < last_block; block++) {
      const long h = head_of(block), i0 = block % blocks_per_head * ROWS;
      const int rows = least((long)ROWS, p.Nq - i0);
      if (h != seen_head) see = Visibility(p, b, h), seen_head = h;
      const long end = least(k1, see.limit_of(i0 + rows - 1));
      float *o = O + (one_block ? 0 : (block - first_block) * ROWS * Dvp);
      if (k0 == 0) memset(o, 0, sizeof(float) * rows * Dvp);
      if (end > k0)
        for (int r = 0; r < rows; r++)
          read_units<T>(row_of(p.q, p.type, b, h, i0 + r), p.type, D, round_up(units, W), Q + r * LDA);

      for (long j0 = k0; j0 < end; j0 += KEYS) {
        const int n = least((long)KEYS, end - j0), padded = round_up(n, W);
        for (int j = 0; j < n; j += NR) {  // S = Q K^T
          const unit *panel = K + ((j0 - k0 + j) / NR) * units * NR;
          int from = 0;  // whole groups of rows that come before this panel's first key need nothing
          if (see.causal) from = greatest(0L, least((long)rows, (j0 + j - i0) / MR * MR));
          unit *q = Q + from * LDA;
          float *s = S + from * LDA + j;
          if constexpr (T::per_unit == 1) {
            if (in_place) {
              gemm_panel<T, false, SET_RELU>(rows - from, n - j, units, q, 0, panel, NR, s, LDA);
              continue;
            }
          }
          gemm_panel<T, false, SET>(rows - from, n - j, units, q, 0, panel, NR, s, LDA);
        }
        const bool masked = see.mask || (see.causal && j0 + n > i0 + 1);
        if (!done || masked)
          with_activation(p.activation, [&](auto act) {
            for (int r = 0; r < rows; r++) {
              float *s = S + r * LDA, shift = bias[(block - first_block) * ROWS + r];
              if constexpr (T::per_unit == 1) {
                if (!done) weigh<decltype(act)::value>(s, padded, scale, shift, [&](int j, vf w) { store(s + j, w); });
                if (masked) see.apply(i0 + r, j0, j0 + n, s);
              } else {
                auto *pairs = (uint16_t *)(P + r * LDA);
                auto narrow = [&](int j, vf w) { *(vh_at *)(pairs + j) = to_bf16(w); };
                if (masked) {
                  weigh<decltype(act)::value>(s, padded, scale, shift, [&](int j, vf w) { store(s + j, w); });
                  see.apply(i0 + r, j0, j0 + n, s);
                  for (int j = 0; j < padded; j += W) narrow(j, load(s + j));
                } else {
                  weigh<decltype(act)::value>(s, padded, scale, shift, narrow);
                }
                if (n & 1) pairs[n] = 0;
              }
            }
          });
        constexpr int STEP = T::tiles ? 32 : MR;
        for (int r = 0; r < rows; r += STEP) {  // O += P V
          const int m = least(STEP, rows - r);
          const long k = see.causal ? greatest(0L, least((long)n, i0 + r + m - j0)) : n;
          for (int d = 0; d < Dv; d += NR)
            gemm_panel<T, false, ADD>(m, Dv - d, (k + T::per_unit - 1) / T::per_unit, weights + r * LDA, 0,
                                      V + (j0 - k0) / T::per_unit * Dvp + d, Dvp, o + r * Dvp + d, Dvp);
        }
      }
      if (k1 == p.Nk)  // the last keys: scale and write
        for (int r = 0; r < rows; r++) {
          const float f = factor[(block - first_block) * ROWS + r] * after;
          float *x = o + r * Dvp;
          for (int d = 0; d < Dvp; d += W) store(x + d, load(x + d) * f);
          write_row((void *)row_of(p.out, p.type, b, h, i0 + r), p.type, Dv, x);
        }
    }
  }
  return true;
}

template <class T> static int pointwise_forward(const FormixPointwise &p) {
  const long pairs = p.B * p.Hkv, blocks = p.Hq / p.Hkv * ((p.Nq + ROWS - 1) / ROWS);
  const long parts = parts_for(pairs, p.threads, blocks, p.causal);
  int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads) reduction(| : failed)
  for (long task = 0; task < pairs * parts; task++) {
    const long part = parts - 1 - task % parts, pair = task / parts;  // causal: the longest part first
    failed |= !pointwise_forward_task<T>(p, pair / p.Hkv, pair % p.Hkv, part, parts);
  }
  return failed;
}
