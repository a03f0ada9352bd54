// Vectors of W floats by the compilers' vector extension, and the few operations that it does not express well.
// Each instruction set compiles this file anew inside its own namespace (kernels.cpp).
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));
// The same, at any address and over any object.
typedef float vf_at __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t vu_at __attribute__((vector_size(W * 4), aligned(1), may_alias));
typedef uint16_t vh_at __attribute__((vector_size(W * 2), aligned(1), may_alias));
typedef uint8_t vb_at __attribute__((vector_size(W), aligned(1), may_alias));

static INLINE vf splat(float x) { return x - vf{}; }
static INLINE vf load(const float *p) { return *(const vf_at *)p; }
static INLINE vu load(const uint32_t *p) { return *(const vu_at *)p; }
static INLINE void store(float *p, vf x) { *(vf_at *)p = x; }
static INLINE void store(uint32_t *p, vu x) { *(vu_at *)p = x; }

template <int A> struct Constant { static constexpr int value = A; };  // a number as an argument type
template <class T> static INLINE T least(T a, T b) { return a < b ? a : b; }
template <class T> static INLINE T greatest(T a, T b) { return a > b ? a : b; }

// max(a, x) and min(a, x) that keep a NaN in x: x86 returns the second operand then.
static INLINE vf vmax(vf a, vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)x);
#elif defined(__SSE2__)
  return (vf)_mm_max_ps((__m128)a, (__m128)x);
#else
  return a > x ? a : x;
#endif
}
static INLINE vf vmin(vf a, vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)x);
#elif defined(__SSE2__)
  return (vf)_mm_min_ps((__m128)a, (__m128)x);
#else
  return a < x ? a : x;
#endif
}
static INLINE vf vabs(vf x) { return (vf)((vu)x & 0x7fffffffu); }
static INLINE vf keep(vi condition, vf x) { return (vf)((vi)x & condition); }  // x where the condition is ~0, else 0

// Unsigned 8 or 16 to 32 bits, and 32 to 16, dropping the high ones. GCC 12 would cut vectors of 512 bits in pieces.
#if defined(__AVX512F__)
static INLINE vu widen(vb x) { return (vu)_mm512_cvtepu8_epi32((__m128i)x); }
static INLINE vu widen(vh x) { return (vu)_mm512_cvtepu16_epi32((__m256i)x); }
static INLINE vh narrow(vu x) { return (vh)_mm512_cvtepi32_epi16((__m512i)x); }
#else
static INLINE vu widen(vb x) { return __builtin_convertvector(x, vu); }
static INLINE vu widen(vh x) { return __builtin_convertvector(x, vu); }
static INLINE vh narrow(vu x) { return __builtin_convertvector(x, vh); }
#endif

// bf16 <-> fp32, rounding to nearest even; a NaN stays one.
static INLINE vf from_bf16(vh x) { return (vf)(widen(x) << 16); }
static INLINE vu bf16_bits(vf x) {  // in the low half of each lane
#if defined(__AVX512BF16__)
  return widen((vh)_mm512_cvtneps_pbh((__m512)x));
#else
  vu u = (vu)x;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (vu)((vi)(x == x)) ? rounded : ((u >> 16) | 0x40u);
#endif
}
static INLINE vh to_bf16(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  return narrow(bf16_bits(x));
#endif
}
#if defined(__AVX512BF16__)
static INLINE vu bf16_pair(vf low, vf high) {  // 32 neighbours: those of `low` come first
  return (vu)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
// x where the 16-bit lanes of the condition are not 0, else 0.
static INLINE vu keep_lanes(vu condition, vu x) {
  return (vu)_mm512_maskz_mov_epi16(_mm512_test_epi16_mask((__m512i)condition, (__m512i)condition), (__m512i)x);
}
// Pairs a[0], b[0], a[1], b[1], ... of two rows of 32 lanes of 16 bits.
static INLINE void pair_rows(vu a, vu b, vu pairs[2]) {
  alignas(64) static const uint16_t order[2][32] = {{0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
                                                    {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                     24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  for (int i = 0; i < 2; i++)
    pairs[i] = (vu)_mm512_permutex2var_epi16((__m512i)a, _mm512_load_si512(order[i]), (__m512i)b);
}
// The same pairs in the order that costs one instruction each: position x of the 32 holds pair paired(x).
static INLINE void pair_rows_mixed(vu a, vu b, vu pairs[2]) {
  pairs[0] = (vu)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b), pairs[1] = (vu)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
}
static INLINE int paired(int x) { return x % 16 / 4 * 8 + x / 16 * 4 + x % 4; }
// 32 floats in that order as bf16 in their own.
static INLINE vu bf16_unmixed(vf low, vf high) {
  const __m512i fours = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  return (vu)_mm512_permutexvar_epi64(fours, (__m512i)bf16_pair(low, high));
}
#endif
// fp16 <-> fp32 by integer arithmetic (Giesen): works without F16C and on any compiler.
static INLINE vf from_f16(vh h) {
  vu x = widen(h);
  vu magnitude = (x & 0x7fffu) << 13;
  vf value = (vf)magnitude * 0x1p112f;  // moves the exponent; turns subnormals into normal numbers
  vu special = (vu)((vi)(magnitude >= (0x7c00u << 13)));  // inf and NaN
  return (vf)((vu)value | (special & 0x7f800000u) | ((x & 0x8000u) << 16));
}
static INLINE vh to_f16(vf f) {
  vu sign = (vu)f & 0x80000000u, x = (vu)f ^ sign;
  vu normal = (x - (112u << 23) + 0xfffu + ((x >> 13) & 1u)) >> 13;
  vu small = (vu)((vf)x + 0.5f) - 0x3f000000u;  // the addition rounds at the subnormal step 2^-24
  vu result = (vu)((vi)(x < (113u << 23))) ? small : normal;
  result = (vu)((vi)(x >= (143u << 23))) ? (vu{} + 0x7c00u) : result;
  result = (vu)((vi)(x > (255u << 23))) ? (vu{} + 0x7e00u) : result;
  return narrow(result | (sign >> 16));
}

// In place transposition of a W x W block of 32-bit lanes: swap off-diagonal halves, quarters, ...
template <int S> static INLINE void transpose_step(vu *r) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & S)) {
      vu a = r[i], b = r[i + S];
#define LOW(l) ((l) & S ? W + (l) - S : (l))
#define HIGH(l) ((l) & S ? W + (l) : (l) + S)
#if defined(__AVX512F__)
      r[i] = __builtin_shufflevector(a, b, LOW(0), LOW(1), LOW(2), LOW(3), LOW(4), LOW(5), LOW(6), LOW(7), LOW(8),
                                     LOW(9), LOW(10), LOW(11), LOW(12), LOW(13), LOW(14), LOW(15));
      r[i + S] = __builtin_shufflevector(a, b, HIGH(0), HIGH(1), HIGH(2), HIGH(3), HIGH(4), HIGH(5), HIGH(6), HIGH(7),
                                         HIGH(8), HIGH(9), HIGH(10), HIGH(11), HIGH(12), HIGH(13), HIGH(14), HIGH(15));
#elif defined(__AVX2__)
      r[i] = __builtin_shufflevector(a, b, LOW(0), LOW(1), LOW(2), LOW(3), LOW(4), LOW(5), LOW(6), LOW(7));
      r[i + S] = __builtin_shufflevector(a, b, HIGH(0), HIGH(1), HIGH(2), HIGH(3), HIGH(4), HIGH(5), HIGH(6), HIGH(7));
#else
      r[i] = __builtin_shufflevector(a, b, LOW(0), LOW(1), LOW(2), LOW(3));
      r[i + S] = __builtin_shufflevector(a, b, HIGH(0), HIGH(1), HIGH(2), HIGH(3));
#endif
#undef LOW
#undef HIGH
    }
}
static INLINE void transpose(vu *r) {
#if defined(__AVX512F__)
  transpose_step<8>(r);
#endif
#if defined(__AVX2__)
  transpose_step<4>(r);
#endif
  transpose_step<2>(r);
  transpose_step<1>(r);
}
#if defined(__AVX512F__)
// The same from memory to memory; rows lie `stride` bytes apart there, `ld` units here. Four quarters of rows come together as
// they are loaded, which spares half of the exchanges: the shuffles of 512 bits have one port, loads and inserts several.
static INLINE void transpose_from(const char *from, long stride, uint32_t *to, long ld) {
#pragma GCC unroll 4
  for (int c = 0; c < W; c += 4) {
    __m512i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // columns c ... c + 3 of rows i, i + 4, i + 8, i + 12
      auto quarter = [&](int q) { return _mm_loadu_si128((const __m128i *)(from + (i + 4 * q) * stride + 4 * c)); };
      r[i] = _mm512_inserti32x4(_mm512_castsi128_si512(quarter(0)), quarter(1), 1);
      r[i] = _mm512_inserti32x4(_mm512_inserti32x4(r[i], quarter(2), 2), quarter(3), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpacklo_epi32(r[2], r[3]),
                  x = _mm512_unpackhi_epi32(r[0], r[1]), y = _mm512_unpackhi_epi32(r[2], r[3]);
    store(to + c * ld, (vu)_mm512_unpacklo_epi64(a, b)), store(to + (c + 1) * ld, (vu)_mm512_unpackhi_epi64(a, b));
    store(to + (c + 2) * ld, (vu)_mm512_unpacklo_epi64(x, y)), store(to + (c + 3) * ld, (vu)_mm512_unpackhi_epi64(x, y));
  }
}
#endif
