// The one matrix product everything is built from: C[m, n] (+)= sum_k A[m, k] B[k, n] on packed operands in cache.
//
// Operands consist of 32-bit units along k: one float, or two neighbouring bf16 (for vdpbf16ps). B is a panel of
// contiguous rows [k][NR]; A is read one unit at a time and broadcast, by rows ([m][LDA], constant so that addresses
// are one register plus a constant) or by columns ([k][lda], "transposed", for the products over queries of the backward).
// C stays in MR x NV vector registers for the whole k loop.
#pragma once
#include "simd.h"
#if defined(FORMIX_TILES)
#include "tiles.h"
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MR = 12;  // 32 vector registers: 24 of C
#else
constexpr int MR = 6;  // 16 registers: 12 of C
#endif
constexpr int NR = 2 * W;   // columns of a panel
constexpr int LDA = 400;    // units between rows of A: KEYS below plus a little against cache aliasing
constexpr int KEYS = 384;   // columns of a score block

struct Nothing {};

struct Float {  // a unit is one float
  using unit = float;
  using session = Nothing;  // lives while a thread multiplies
  static constexpr int per_unit = 1;
  static constexpr bool tiles = false;
  static INLINE vf multiply_add(vf c, float a, vf b) { return c + a * b; }
  static INLINE vf load_units(const float *p) { return load(p); }
};
#if defined(__AVX512BF16__)
struct Bf16 {  // a unit is a pair of bf16 (k, k + 1)
  using unit = uint32_t;
  static constexpr int per_unit = 2;
#if defined(FORMIX_TILES)
  using session = TileSession;
  static constexpr bool tiles = true;
#else
  using session = Nothing;
  static constexpr bool tiles = false;
#endif
  static INLINE vf multiply_add(vf c, uint32_t a, vu b) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
  }
  static INLINE vu load_units(const uint32_t *p) { return load(p); }
};
#endif

enum Store { ADD, SET, SET_RELU, SET_GATED };  // what to do with C; gated: zero where `gate`, laid out as C, is not positive

template <class T, int M, int NV, bool TRANSPOSED, Store STORE>
static __attribute__((noinline)) void gemm_block(long k, const typename T::unit *a, long lda, const typename T::unit *b,
                                                 long ldb, float *c, long ldc, const float *gate = nullptr) {
  vf acc[M][NV];
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) acc[i][j] = vf{};
  for (; k > 0; k--) {
    auto b0 = T::load_units(b), b1 = T::load_units(b + (NV - 1) * W);
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
      auto x = TRANSPOSED ? a[i] : a[i * LDA];
      acc[i][0] = T::multiply_add(acc[i][0], x, b0);
      if (NV > 1) acc[i][NV - 1] = T::multiply_add(acc[i][NV - 1], x, b1);
    }
    a += TRANSPOSED ? lda : 1;
    b += ldb;
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) {
      float *p = c + i * ldc + j * W;
      vf x = acc[i][j];
      if (STORE == ADD) x = x + load(p);
      if (STORE == SET_RELU) x = vmax(vf{}, x);
      if (STORE == SET_GATED) x = keep(load(gate + i * ldc + j * W) > 0.0f, x);
      store(p, x);
    }
}

// The same for any number of rows and one panel of up to NR columns.
template <class T, bool TRANSPOSED, Store STORE>
static INLINE void gemm_panel(int m, int columns, long k, const typename T::unit *a, long lda,
                              const typename T::unit *b, long ldb, float *c, long ldc, const float *gate = nullptr) {
#if defined(FORMIX_TILES)
  if constexpr (T::tiles && !TRANSPOSED) {  // whole tiles by AMX; what is left of rows, columns and k by vectors, below
    static_assert(STORE == ADD || STORE == SET);
    const long k_tiles = k / TILE, rest = k % TILE;
    if (columns > W && k_tiles > 0)
      while (m >= TILE) {
        const int done = m >= 2 * TILE ? 2 * TILE : TILE;
        if (done > TILE)
          tile_block<true, STORE == ADD>(k_tiles, a, LDA, b, ldb, c, ldc);
        else
          tile_block<false, STORE == ADD>(k_tiles, a, LDA, b, ldb, c, ldc);
        if (rest)
          for (int i = 0; i < done; i += 8)
            gemm_block<T, 8, 2, false, ADD>(rest, a + (long)i * LDA + k_tiles * TILE, 0, b + k_tiles * TILE * ldb, ldb,
                                            c + i * ldc, ldc);
        a += (long)done * LDA, c += done * ldc, m -= done;
      }
  }
#endif
  auto rows = [&](auto count) {
    constexpr int M = decltype(count)::value;
    while (m >= M) {
      if (columns > W)
        gemm_block<T, M, 2, TRANSPOSED, STORE>(k, a, lda, b, ldb, c, ldc, gate);
      else
        gemm_block<T, M, 1, TRANSPOSED, STORE>(k, a, lda, b, ldb, c, ldc, gate);
      if (STORE == SET_GATED) gate += M * ldc;
      a += TRANSPOSED ? M : (long)M * LDA, c += M * ldc, m -= M;
    }
  };
  rows(Constant<MR>{});
  if (MR > 8) rows(Constant<8>{});
  rows(Constant<4>{});
  rows(Constant<2>{});
  rows(Constant<1>{});
}

// C = A B if it is the `first` of several, else C += A B.
template <class T, bool TRANSPOSED>
static INLINE void sum_panel(bool first, int m, int columns, long k, const typename T::unit *a, long lda,
                             const typename T::unit *b, long ldb, float *c, long ldc) {
  if (first)
    gemm_panel<T, TRANSPOSED, SET>(m, columns, k, a, lda, b, ldb, c, ldc);
  else
    gemm_panel<T, TRANSPOSED, ADD>(m, columns, k, a, lda, b, ldb, c, ldc);
}
