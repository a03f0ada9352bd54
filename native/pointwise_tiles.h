// The two products of pointwise attention's forward on AMX tiles.
//
// A panel of 32 x 32 scores never leaves L1: between the multiplications of the next one, vectors put it through h and narrow
// it to bf16, the left operand of the second product.
#pragma once
#include "activation_bf16.h"
#include "mask.h"
#include "tiles.h"

constexpr int PANEL = 2 * TILE;  // queries and keys of a panel of scores
constexpr int TILE_KEYS = 384;  // keys of a block of weights, which stays in L1 while keys and values stream past it
constexpr long HELD_KEYS = 20000;  // bytes of packed keys that may stay in L1 instead
constexpr int LDP = TILE_KEYS / 2 + TILE;  // 32-bit units between rows of weights; not a power of two, for the cache's sake

// What the products of a block of weights share: `rows` <= PANEL queries from i0 on, n keys from j0 on. Weights are
// [PANEL][LDP]. PLAIN: h takes raw scores. TWO tiles of rows, or one.
template <int ACT, bool PLAIN, bool TWO> struct TileWeights {
  const Bf16Activation<ACT> &h;
  const Visibility &see;
  const long i0;
  const int rows;
  const long j0;
  const int n;
  const float scale, *bias;
  uint32_t *P;
  static constexpr int height = TWO ? PANEL : TILE;

  // Rows first .. first + N of the panel of scores s at key j on their way to weights, as bf16 pairs of keys.
  template <int N> INLINE void weigh(const float *s, int j, int first) const {
    s += first * PANEL;
    uint32_t *to = P + first * LDP + j / 2;
    const float *row_bias = bias + first;
#pragma GCC unroll 8
    for (int r = 0; r < N; r++) {
      vf a = load(s + r * PANEL), b = load(s + r * PANEL + W);
      if (!PLAIN) a = a * scale + row_bias[r], b = b * scale + row_bias[r];
      store(to + r * LDP, bf16_pair(h(a), h(b)));
    }
  }
  void hide(int j) const {  // what the rows may not see of the panel at j
    const long end = least(j + PANEL, n);
    if (!see.mask && !(see.causal && j0 + j + PANEL > i0 + 1)) return;
    for (long r = 0; r < rows; r++) {
      uint32_t *to = P + r * LDP + j / 2;
      alignas(64) float x[PANEL];
      store(x, from_bf16(*(const vh_at *)to)), store(x + W, from_bf16(*(const vh_at *)(to + W / 2)));
      see.apply(i0 + r, j0 + j, j0 + end, x);
      store(to, bf16_pair(load(x), load(x + W)));
    }
  }
  void end() const {  // the last tile holds keys that no row may see, or none
    if (n % PANEL == 0) return;
    alignas(64) uint16_t seen[PANEL];
    for (int j = 0; j < PANEL; j++) seen[j] = j < n % PANEL ? 0xffff : 0;
    for (int r = 0; r < height; r++) {
      uint32_t *at = P + r * LDP + n / PANEL * TILE;
      store(at, load(at) & load((const uint32_t *)seen));
    }
  }

  // Q is [PANEL][16 k_tiles] units, K panels [n / 32][16 k_tiles][32]; both are padded with zeros. `soon` is called once for
  // a panel, to ask for memory.
  template <class Soon> void run(int k_tiles, const uint32_t *Q, const uint32_t *K, const Soon &soon) const;
  // The same for K_TILES = 1 or 2 tiles of channels: the queries stay in registers. Their rows lie `ldq` bytes apart.
  template <int K_TILES, class Soon> void run_held(const void *Q, long ldq, const uint32_t *K, const Soon &soon) const;
};

template <int ACT, bool PLAIN, bool TWO>
template <class Soon>
void TileWeights<ACT, PLAIN, TWO>::run(int k_tiles, const uint32_t *Q, const uint32_t *K, const Soon &soon) const {
  alignas(64) float panels[2][PANEL * PANEL];
  const long ldq = (long)k_tiles * TILE;
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
      if (weighed < height) weigh<8>(panels[(j / PANEL & 1) ^ 1], j - PANEL, weighed), weighed += 8;
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
  for (int first = 0; first < height; first += 8) weigh<8>(panels[last / PANEL & 1], last, first);
  hide(last);
  end();
}

// Few channels make stores of scores and narrowing as dear as products. They and loads of tiles share two ports of the core,
// and a store waits for its product; so the work on 16 keys is spread: scores are stored while the next 16 keys are
// multiplied, and half of a panel's rows is weighed in the time of each 16 keys, one such time after its last store.
template <int ACT, bool PLAIN, bool TWO>
template <int K_TILES, class Soon>
void TileWeights<ACT, PLAIN, TWO>::run_held(const void *Q, long ldq, const uint32_t *K, const Soon &soon) const {
  alignas(64) float panels[2][PANEL * PANEL];
  constexpr long panel_units = (long)K_TILES * TILE * PANEL;
  constexpr int quarter = height / 4;
  const bool stream = n * K_TILES * TILE * 4 > HELD_KEYS;
  auto weigh_old = [&](int j, int q) {  // quarter q of the panel at j, if there is one
    if (j >= 0) weigh<quarter>(panels[j / PANEL & 1], j, q * quarter);
  };
  auto load_keys = [&](const uint32_t *k) {
    if (stream) {
      TILE_STREAM(2, k, PANEL * 4);
      if (K_TILES == 2) TILE_STREAM(3, k + TILE * PANEL, PANEL * 4);
    } else {
      TILE_LOAD(2, k, PANEL * 4);
      if (K_TILES == 2) TILE_LOAD(3, k + TILE * PANEL, PANEL * 4);
    }
  };
  // Multiplies 16 keys (if there are `any`), stores the scores of those before at s, weighs quarters q and q + 1 of the panel
  // at j, and loads the `next` keys.
  auto block = [&](bool any, float *s, int j, int q, const uint32_t *next) {
    if (s) TILE_STORE(0, s, PANEL * 4);
    TILE_ZERO(0);
    if (any) TILE_MULTIPLY(0, 4, 2);
    if (any && K_TILES == 2) TILE_MULTIPLY(0, 5, 3);
    weigh_old(j, q);
    if (TWO) {
      if (s) TILE_STORE(1, s + TILE * PANEL, PANEL * 4);
      TILE_ZERO(1);
      if (any) TILE_MULTIPLY(1, 6, 2);
      if (any && K_TILES == 2) TILE_MULTIPLY(1, 7, 3);
    }
    if (next) load_keys(next);
    weigh_old(j, q + 1);
    __asm__ volatile("" ::: "memory");
  };
  __asm__ volatile("" ::: "memory");
  const auto q = (const char *)Q;
  TILE_LOAD(4, q, ldq);
  if (K_TILES == 2) TILE_LOAD(5, q + TILE * 4, ldq);
  if (TWO) TILE_LOAD(6, q + TILE * ldq, ldq);
  if (TWO && K_TILES == 2) TILE_LOAD(7, q + TILE * ldq + TILE * 4, ldq);
  load_keys(K);
  int j = 0;
  for (const uint32_t *k = K; j < n; j += PANEL, k += panel_units) {
    float *s = panels[j / PANEL & 1], *before = panels[(j / PANEL & 1) ^ 1];
    block(true, j ? before + TILE : nullptr, j - 2 * PANEL, 2, k + TILE);
    if (j >= 2 * PANEL) hide(j - 2 * PANEL);
    soon();
    block(n - j > TILE, s, j - PANEL, 0, n - j > PANEL ? k + panel_units : nullptr);
  }
  float *s = panels[(j / PANEL & 1) ^ 1] + TILE;
  TILE_STORE(0, s, PANEL * 4);
  if (TWO) TILE_STORE(1, s + TILE * PANEL, PANEL * 4);
  __asm__ volatile("" ::: "memory");
  for (int q = 2; q < 4; q++) weigh_old(j - 2 * PANEL, q);
  if (j >= 2 * PANEL) hide(j - 2 * PANEL);
  for (int q = 0; q < 4; q++) weigh_old(j - PANEL, q);
  hide(j - PANEL);
  end();
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
