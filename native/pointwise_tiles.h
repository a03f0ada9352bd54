// The two products of pointwise attention's forward on AMX tiles.
//
// A panel of 32 x 32 scores never leaves L1: between the multiplications of the next panel, vectors put the last one through
// h and narrow it to bf16, the left operand of the second product. Panels of keys come from L2; TILE_ROWS queries use
// each before it is evicted.
#pragma once
#include "activation_bf16.h"
#include "mask.h"
#include "tiles.h"

constexpr int PANEL = 2 * TILE;      // queries and keys of a panel of scores
constexpr int TILE_ROWS = 2 * PANEL;  // queries of a block
constexpr int TILE_KEYS = 512;       // keys of a block of weights
constexpr int LDP = TILE_KEYS / 2 + TILE;  // 32-bit units between rows of weights; not a power of two, for the cache's sake

// A panel of scores on its way to weights: rows first .. first + n of it, as bf16 pairs of keys.
template <int ACT, bool PLAIN>
static INLINE void weigh_rows(const Bf16Activation<ACT> &h, const float *s, int first, int n, float scale,
                              const float *bias, uint32_t *to) {
#pragma GCC unroll 4
  for (int r = first; r < first + n; r++) {
    vf a = load(s + r * PANEL), b = load(s + r * PANEL + W);
    if (!PLAIN) a = a * scale + bias[r], b = b * scale + bias[r];
    store(to + r * LDP, bf16_pair(h(a), h(b)));
  }
}

// Weights of `rows` queries from i0 on and n keys from j0 on, [TILE_ROWS][LDP]. Q is [TILE_ROWS][16 k_tiles] units, K
// panels [n / 32][16 k_tiles][32]; both are padded with zeros. PLAIN: h takes raw scores.
template <int ACT, bool PLAIN>
static void tile_weights(const Bf16Activation<ACT> &h, const Visibility &see, long i0, int rows, long j0, int n,
                         int k_tiles, const uint32_t *Q, const uint32_t *K, float scale, const float *bias, uint32_t *P) {
  alignas(64) float panels[2][PANEL * PANEL];
  const long ldq = (long)k_tiles * TILE, strip = ldq * PANEL;
  const bool masked = see.mask || (see.causal && j0 + n > i0 + 1);
  int done = 0, row = 0, key = 0;  // panels multiplied; the last one's place
  auto weigh = [&](int first, int count) {
    weigh_rows<ACT, PLAIN>(h, panels[(done - 1) & 1], first, count, scale, bias + row, P + row * LDP + key / 2);
  };
  auto hide = [&] {  // what the last panel's rows may not see
    const long i = i0 + row, j = j0 + key, end = least(j + PANEL, j0 + n);
    if (!masked || (!see.mask && j + PANEL <= i + 1)) return;
    for (long r = 0; r < PANEL && row + r < rows; r++) {
      uint32_t *to = P + (row + r) * LDP + key / 2;
      alignas(64) float x[PANEL];
      store(x, from_bf16(*(const vh_at *)to)), store(x + W, from_bf16(*(const vh_at *)(to + W / 2)));
      see.apply(i + r, j, end, x);
      store(to, bf16_pair(load(x), load(x + W)));
    }
  };
  for (int j = 0; j < n; j += PANEL)
    for (int r = 0; r < rows; r += PANEL) {
      if (see.causal && j0 + j > i0 + r + PANEL - 1) continue;
      const uint32_t *q = Q + r * ldq, *k = K + j / PANEL * strip;
      __asm__ volatile("" ::: "memory");  // the load intrinsics do not say that they read memory
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      TILE_ZERO(3);
      int weighed = done ? 0 : PANEL;
      for (int t = 0; t < k_tiles; t++, q += TILE, k += TILE * PANEL) {
        TILE_LOAD(4, q, ldq * 4);
        TILE_LOAD(6, k, PANEL * 4);
        TILE_MULTIPLY(0, 4, 6);
        if (weighed < PANEL) weigh(weighed, 8), weighed += 8;
        TILE_LOAD(7, k + TILE, PANEL * 4);
        TILE_MULTIPLY(1, 4, 7);
        TILE_LOAD(5, q + TILE * ldq, ldq * 4);
        TILE_MULTIPLY(2, 5, 6);
        if (weighed < PANEL) weigh(weighed, 8), weighed += 8;
        TILE_MULTIPLY(3, 5, 7);
      }
      for (; weighed < PANEL; weighed += 8) weigh(weighed, 8);
      if (done) hide();
      float *s = panels[done++ & 1];
      TILE_STORE(0, s, PANEL * 4);
      TILE_STORE(1, s + TILE, PANEL * 4);
      TILE_STORE(2, s + TILE * PANEL, PANEL * 4);
      TILE_STORE(3, s + TILE * PANEL + TILE, PANEL * 4);
      __asm__ volatile("" ::: "memory");
      row = r, key = j;
    }
  if (done) {
    for (int first = 0; first < PANEL; first += 8) weigh(first, 8);
    hide();
  }
  if (n % PANEL) {  // the last tile holds keys that no row may see, or none
    alignas(64) uint16_t seen[PANEL];
    for (int j = 0; j < PANEL; j++) seen[j] = j < n % PANEL ? 0xffff : 0;
    for (int r = 0; r < rows; r++) {
      uint32_t *last = P + r * LDP + n / PANEL * TILE;
      store(last, load(last) & load((const uint32_t *)seen));
    }
  }
}

// O [TILE_ROWS][ldo] += P V. V is [columns / 16][ldv / 16 tiles][16][16]: what a tile reads lies together. Four tiles of rows
// share each tile of V, which comes from L2.
static void tile_output(const Visibility &see, long i0, int rows, long j0, int n, const uint32_t *P, const uint32_t *V,
                        long ldv, int columns, float *o, long ldo) {
  for (int d = 0; d < columns; d += TILE, V += TILE * ldv, o += TILE) {
    const long seen = see.causal ? least((long)n, i0 + rows - j0) : n;
    long k_tiles = (seen + PANEL - 1) / PANEL;
    if (k_tiles <= 0) continue;
    // causal: the first half of the rows ends a tile earlier
    const long both = see.causal && rows > PANEL ? greatest(0L, least(k_tiles, (i0 + PANEL - j0 + PANEL - 1) / PANEL)) : k_tiles;
    const bool four = rows > PANEL;
    const uint32_t *p = P, *v = V;
    __asm__ volatile("" ::: "memory");
    TILE_LOAD(0, o, ldo * 4);
    TILE_LOAD(1, o + TILE * ldo, ldo * 4);
    if (four) {
      TILE_LOAD(2, o + 2 * TILE * ldo, ldo * 4);
      TILE_LOAD(3, o + 3 * TILE * ldo, ldo * 4);
    }
    for (long t = 0; t < k_tiles; t++, p += TILE, v += TILE * TILE) {
      TILE_LOAD(4, v, TILE * 4);
      if (t < both) {
        TILE_LOAD(5, p, LDP * 4);
        TILE_MULTIPLY(0, 5, 4);
        TILE_LOAD(6, p + TILE * LDP, LDP * 4);
        TILE_MULTIPLY(1, 6, 4);
      }
      if (four) {
        TILE_LOAD(7, p + 2 * TILE * LDP, LDP * 4);
        TILE_MULTIPLY(2, 7, 4);
        TILE_LOAD(5, p + 3 * TILE * LDP, LDP * 4);
        TILE_MULTIPLY(3, 5, 4);
      }
    }
    TILE_STORE(0, o, ldo * 4);
    TILE_STORE(1, o + TILE * ldo, ldo * 4);
    if (four) {
      TILE_STORE(2, o + 2 * TILE * ldo, ldo * 4);
      TILE_STORE(3, o + 3 * TILE * ldo, ldo * 4);
    }
    __asm__ volatile("" ::: "memory");
  }
}
