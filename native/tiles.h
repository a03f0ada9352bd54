// Tiles of AMX (8 registers of 16 rows x 64 bytes), or the same in plain C++ so that the kernels which use them can be
// tested on any processor (CMake option FORMIX_AMX_EMULATED). Register numbers are literals, as the intrinsics want.
#pragma once
#include "simd.h"

// 16 rows x 64 bytes for all eight; the configuration belongs to a thread.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#if defined(FORMIX_TILES_EMULATED)
static thread_local float tile_file[8][16][16];
static inline void emulated_load(int t, const void *p, long stride) {
  for (int r = 0; r < 16; r++) memcpy(tile_file[t][r], (const char *)p + r * stride, 64);
}
static inline void emulated_store(int t, void *p, long stride) {
  for (int r = 0; r < 16; r++) memcpy((char *)p + r * stride, tile_file[t][r], 64);
}
static inline void emulated_multiply(int c, int a, int b) {  // tdpbf16ps: pairs along k, low half first
  auto half = [](float unit, int high) {
    uint32_t u;
    memcpy(&u, &unit, 4);
    u = high ? u & 0xffff0000u : u << 16;
    memcpy(&unit, &u, 4);
    return unit;
  };
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++)
        for (int high = 0; high < 2; high++)
          tile_file[c][m][n] += half(tile_file[a][m][k], high) * half(tile_file[b][k][n], high);
}
#define TILE_CONFIG(p) ((void)(p))
#define TILE_RELEASE() ((void)0)
#define TILE_ZERO(t) memset(tile_file[t], 0, 1024)
#define TILE_LOAD(t, p, stride) emulated_load(t, p, stride)
#define TILE_STREAM(t, p, stride) emulated_load(t, p, stride)
#define TILE_STORE(t, p, stride) emulated_store(t, p, stride)
#define TILE_MULTIPLY(c, a, b) emulated_multiply(c, a, b)
#else
#define TILE_CONFIG(p) _tile_loadconfig(p)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define TILE_STREAM(t, p, stride) _tile_stream_loadd(t, p, stride)  // what comes from L2 does not push others out of L1
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

// While one of these lives, this thread's tiles are configured.
struct TileSession {
  TileSession() {
    TileConfig config;
    __asm__ volatile("" ::"r"(&config) : "memory");  // the intrinsic does not say that it reads memory
    TILE_CONFIG(&config);
  }
  ~TileSession() { TILE_RELEASE(); }
};

constexpr int TILE = 16;  // rows, and 32-bit units in a row

// C [32 or 16 rows][32] (+)= A [rows][k tiles] B [k tiles][32]; rows of A are `lda` units apart.
template <bool TWO, bool ACCUMULATE>
static __attribute__((noinline)) void tile_block(long k_tiles, const uint32_t *a, long lda, const uint32_t *b, long ldb,
                                                 float *c, long ldc) {
  __asm__ volatile("" ::: "memory");  // the load intrinsics do not say that they read memory
  const long sa = lda * 4, sb = ldb * 4, sc = ldc * 4;
  const uint32_t *a2 = a + TILE * lda;
  float *c2 = c + TILE * ldc;
  if (ACCUMULATE) {
    TILE_LOAD(0, c, sc);
    TILE_LOAD(1, c + TILE, sc);
    if (TWO) {
      TILE_LOAD(2, c2, sc);
      TILE_LOAD(3, c2 + TILE, sc);
    }
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (long k = 0; k < k_tiles; k++) {
    TILE_LOAD(4, a, sa);
    TILE_LOAD(6, b, sb);
    TILE_MULTIPLY(0, 4, 6);
    TILE_LOAD(7, b + TILE, sb);
    TILE_MULTIPLY(1, 4, 7);
    if (TWO) {
      TILE_LOAD(5, a2, sa);
      TILE_MULTIPLY(2, 5, 6);
      TILE_MULTIPLY(3, 5, 7);
      a2 += TILE;
    }
    a += TILE, b += TILE * ldb;
  }
  TILE_STORE(0, c, sc);
  TILE_STORE(1, c + TILE, sc);
  if (TWO) {
    TILE_STORE(2, c2, sc);
    TILE_STORE(3, c2 + TILE, sc);
  }
}
