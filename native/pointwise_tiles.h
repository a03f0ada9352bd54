// The two products of pointwise attention's forward on AMX tiles.
//
// A panel of 32 x 32 scores never leaves L1: between the multiplications of the next panel, vectors put the last one through
// h and narrow it to bf16, the left operand of the second product.
#pragma once
#include "activation_bf16.h"
#include "mask.h"
#include "tiles.h"

constexpr int PANEL = 2 * TILE;  // queries and keys of a panel of scores
constexpr int TILE_KEYS = 384;  // keys of a block of weights, which stays in L1 while keys and values stream past it
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

// Weights of `rows` <= PANEL queries from i0 on and n keys from j0 on, [PANEL][LDP]. Q is [PANEL][16 k_tiles] units, K panels
// [n / 32][16 k_tiles][32]; both are padded with zeros. PLAIN: h takes raw scores. TWO tiles of rows, or one.
// `soon` is called once for a panel, to ask for memory.
template <int ACT, bool PLAIN, bool TWO, class Soon>
static void tile_weights(const Bf16Activation<ACT> &h, const Visibility &see, long i0, int rows, long j0, int n,
                         int k_tiles, const uint32_t *Q, const uint32_t *K, float scale, const float *bias, uint32_t *P,
                         const Soon &soon) {
  alignas(64) float panels[2][PANEL * PANEL];
  const long ldq = (long)k_tiles * TILE;
  constexpr int height = TWO ? PANEL : TILE;
  auto weigh = [&](int j, int first, int count) {
    weigh_rows<ACT, PLAIN>(h, panels[j / PANEL & 1], first, count, scale, bias, P + j / 2);
  };
  auto hide = [&](int j) {  // what the rows may not see of the panel at j
    const long end = least(j + PANEL, n);
    if (!see.mask && !(see.causal && j0 + j + PANEL > i0 + 1)) return;
    for (long r = 0; r < rows; r++) {
      uint32_t *to = P + r * LDP + j / 2;
      alignas(64) float x[PANEL];
      store(x, from_bf16(*(const vh_at *)to)), store(x + W, from_bf16(*(const vh_at *)(to + W / 2)));
      see.apply(i0 + r, j0 + j, j0 + end, x);
      store(to, bf16_pair(load(x), load(x + W)));
    }
  };
  const uint32_t *q = Q, *k = K;
  auto load_step = [&] {  // what the next step multiplies
    TILE_LOAD(4, q, ldq * 4);
    TILE_STREAM(6, k, PANEL * 4);
    TILE_STREAM(7, k + TILE, PANEL * 4);
    if (TWO) TILE_LOAD(5, q + TILE * ldq, ldq * 4);
    q += TILE, k += TILE * PANEL;
  };
  __asm__ volatile("" ::: "memory");  // the load intrinsics do not say that they read memory
  load_step();
  for (int j = 0; j < n; j += PANEL) {
    const bool wide = n - j > TILE;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    int weighed = j ? 0 : height;
    auto weigh_some = [&] {
      if (weighed < height) weigh(j - PANEL, weighed, 8), weighed += 8;
    };
    q = Q + TILE;
    for (int t = 1;; t++) {
      TILE_MULTIPLY(0, 4, 6);
      weigh_some();
      if (wide) TILE_MULTIPLY(1, 4, 7);
      weigh_some();
      if (TWO) {
        TILE_MULTIPLY(2, 5, 6);
        if (wide) TILE_MULTIPLY(3, 5, 7);
      }
      if (t == k_tiles) break;
      load_step();
    }
    q = Q;
    if (j + PANEL < n) load_step();  // before the stores: a load waits until those before it know their addresses
    soon();
    while (weighed < height) weigh_some();
    if (j) hide(j - PANEL);
    float *s = panels[j / PANEL & 1];
    TILE_STORE(0, s, PANEL * 4);
    TILE_STORE(1, s + TILE, PANEL * 4);
    if (TWO) {
      TILE_STORE(2, s + TILE * PANEL, PANEL * 4);
      TILE_STORE(3, s + TILE * PANEL + TILE, PANEL * 4);
    }
    __asm__ volatile("" ::: "memory");
  }
  const int last = (n - 1) / PANEL * PANEL;
  weigh(last, 0, height);
  hide(last);
  if (n % PANEL) {  // the last tile holds keys that no row may see, or none
    alignas(64) uint16_t seen[PANEL];
    for (int j = 0; j < PANEL; j++) seen[j] = j < n % PANEL ? 0xffff : 0;
    for (int r = 0; r < height; r++) {
      uint32_t *at = P + r * LDP + last / 2;
      store(at, load(at) & load((const uint32_t *)seen));
    }
  }
}

// O [PANEL][ldo] = P V for n keys, added to what is there unless they are the `first`. V is
// [columns / 16][ldv / 16 tiles][16][16]: what a tile reads lies together.
static void tile_output(bool first, int rows, int n, const uint32_t *P, const uint32_t *V, long ldv, int columns, float *o,
                        long ldo) {
  const bool two = rows > TILE;
  __asm__ volatile("" ::: "memory");
  const uint32_t *p, *v, *v2;
  auto start = [&](int d) { p = P, v = V + d * ldv, v2 = d + TILE < columns ? v + TILE * ldv : v; };
  auto load_step = [&] {
    TILE_LOAD(4, p, LDP * 4);
    TILE_STREAM(6, v, TILE * 4);
    TILE_STREAM(7, v2, TILE * 4);
    if (two) TILE_LOAD(5, p + TILE * LDP, LDP * 4);
    p += TILE, v += TILE * TILE, v2 += TILE * TILE;
  };
  start(0);
  load_step();
  for (int d = 0; d < columns; d += PANEL, o += PANEL) {
    const bool wide = d + TILE < columns;
    float *o2 = o + TILE * ldo;
    if (first) {
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      TILE_ZERO(3);
    } else {
      TILE_LOAD(0, o, ldo * 4);
      if (wide) TILE_LOAD(1, o + TILE, ldo * 4);
      if (two) TILE_LOAD(2, o2, ldo * 4);
      if (two && wide) TILE_LOAD(3, o2 + TILE, ldo * 4);
    }
    for (int j = PANEL;; j += PANEL) {
      TILE_MULTIPLY(0, 4, 6);
      if (wide) TILE_MULTIPLY(1, 4, 7);
      if (two) {
        TILE_MULTIPLY(2, 5, 6);
        if (wide) TILE_MULTIPLY(3, 5, 7);
      }
      if (j >= n) break;
      load_step();
    }
    if (d + PANEL < columns) {  // before the stores, as above
      start(d + PANEL);
      load_step();
    }
    TILE_STORE(0, o, ldo * 4);
    if (wide) TILE_STORE(1, o + TILE, ldo * 4);
    if (two) TILE_STORE(2, o2, ldo * 4);
    if (two && wide) TILE_STORE(3, o2 + TILE, ldo * 4);
  }
  __asm__ volatile("" ::: "memory");
}
