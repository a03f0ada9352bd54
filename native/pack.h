// Reading strided rows of any type and laying them out for gemm.h. Everything is padded with zeros to whole vectors.
#pragma once
#include "formix.h"
#include "gemm.h"

static INLINE int round_up(int n, int step) { return (n + step - 1) / step * step; }
static INLINE long element_size(int64_t type) { return type == FORMIX_F32 ? 4 : 2; }
static INLINE const char *row_of(const FormixTensor &t, int64_t type, long b, long h, long n) {
  return (const char *)t.data + (b * t.batch + h * t.head + n * t.token) * element_size(type);
}

// n elements -> floats, zeros up to `padded` (a multiple of W).
static INLINE void read_row(const void *source, int64_t type, int n, int padded, float *to) {
  int i = 0;
  if (type == FORMIX_F32) {
    auto p = (const float *)source;
    for (; i + W <= n; i += W) store(to + i, load(p + i));
    for (; i < n; i++) to[i] = p[i];
  } else {
    auto p = (const uint16_t *)source;
    auto widen = [&](vh x) { return type == FORMIX_BF16 ? from_bf16(x) : from_f16(x); };
    for (; i + W <= n; i += W) store(to + i, widen(*(const vh_at *)(p + i)));
    if (i < n) {
      uint16_t rest[W] = {};
      for (int j = 0; i + j < n; j++) rest[j] = p[i + j];
      store(to + i, widen(*(const vh_at *)rest));
      i += W;
    }
  }
  for (; i < padded; i++) to[i] = 0;
}
static INLINE void write_row(void *target, int64_t type, int n, const float *from) {
  int i = 0;
  if (type == FORMIX_F32) {
    auto p = (float *)target;
    for (; i + W <= n; i += W) store(p + i, load(from + i));
    for (; i < n; i++) p[i] = from[i];
  } else {
    auto p = (uint16_t *)target;
    auto narrow = [&](vf x) { return type == FORMIX_BF16 ? to_bf16(x) : to_f16(x); };
    for (; i + W <= n; i += W) *(vh_at *)(p + i) = narrow(load(from + i));
    if (i < n) {
      float rest[W] = {};
      for (int j = 0; i + j < n; j++) rest[j] = from[i + j];
      vh x = narrow(load(rest));
      for (int j = 0; i + j < n; j++) p[i + j] = x[j];
    }
  }
}

// A row as units along its channels: floats, or bf16 pairs (the input is bf16 then, and keeps its bits).
template <class T> static INLINE void read_units(const void *source, int64_t type, int n, int padded, typename T::unit *to) {
  if constexpr (T::per_unit == 1) {
    read_row(source, type, n, padded, to);
  } else {
    memcpy(to, source, n * 2);
    memset((char *)to + n * 2, 0, padded * 4 - n * 2);
  }
}

// Rows [n][channels] -> panels [n / NR][units of channels][NR]: B for a product over channels (scores, dO V^T).
// `units` is padded to W in the panels' source rows but only `units` rows of each panel are written.
template <class T>
static void pack_transposed(const FormixTensor &t, int64_t type, long b, long h, long first, int n, int channels,
                            typename T::unit *to) {
  using unit = typename T::unit;
  const int units = (channels + T::per_unit - 1) / T::per_unit;
  alignas(64) unit rows[W][256];
  for (int j = 0; j < round_up(n, W); j += W) {
    unit *panel = to + (long)(j / NR) * units * NR + j % NR;
    for (int r = 0; r < W; r++)
      if (j + r < n)
        read_units<T>(row_of(t, type, b, h, first + j + r), type, channels, round_up(units, W), rows[r]);
      else
        memset(rows[r], 0, round_up(units, W) * 4);
    for (int d = 0; d < units; d += W) {
      vu block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; r++) block[r] = load((const uint32_t *)&rows[r][d]);
      transpose(block);
      if (d + W <= units)
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store((uint32_t *)panel + (d + i) * NR, block[i]);
      else
        for (int i = 0; i < units - d; i++) store((uint32_t *)panel + (d + i) * NR, block[i]);
    }
  }
}

// Tokens left out by a padding mask: null if there are none.
struct Padding {
  const uint8_t *tokens = nullptr;
  int64_t stride = 0;
  bool masked(long n) const { return tokens && !tokens[n * stride]; }
};

// Rows [n][channels] -> [units of n][ld]: an operand of a product over tokens (P V, dS K, P^T dO). Padded channels and
// masked tokens are zero. ld = 0: rows without gaps.
template <class T>
static void pack_rows(const FormixTensor &t, int64_t type, long b, long h, long first, int n, int channels,
                      typename T::unit *to, long ld = 0, Padding padding = {}) {
  const int padded = round_up(channels, W);
  if (ld == 0) ld = padded;
  if constexpr (T::per_unit == 1) {
    for (int j = 0; j < n; j++)
      if (padding.masked(first + j))
        memset(to + j * ld, 0, sizeof(float) * padded);
      else
        read_row(row_of(t, type, b, h, first + j), type, channels, padded, to + j * ld);
  } else {
    alignas(64) uint16_t rows[2][512];
    for (int j = 0; j < n; j += 2) {
      for (int r = 0; r < 2; r++)
        if (j + r < n && !padding.masked(first + j + r))
          read_units<T>(row_of(t, type, b, h, first + j + r), type, channels, padded / 2, (uint32_t *)rows[r]);
        else
          memset(rows[r], 0, padded * 2);
      for (int d = 0; d < padded; d += W) {
        vu low = __builtin_convertvector(*(const vh_at *)(rows[0] + d), vu);
        vu high = __builtin_convertvector(*(const vh_at *)(rows[1] + d), vu);
        store(to + (j / 2) * ld + d, low | (high << 16));
      }
    }
  }
}

// A matrix [rows][padded] of floats -> units along its rows, as above.
template <class T> static INLINE void pack_matrix(const float *from, int rows, int padded, typename T::unit *to) {
  if constexpr (T::per_unit == 1) {
    memcpy(to, from, sizeof(float) * rows * padded);
  } else {
    for (int i = 0; i < rows; i += 2)
      for (int d = 0; d < padded; d += W) {
        vu low = bf16_bits(load(from + i * padded + d));
        vu high = i + 1 < rows ? bf16_bits(load(from + (i + 1) * padded + d)) : vu{};
        store(to + i / 2 * padded + d, low | (high << 16));
      }
  }
}

// Asks for the memory of tokens that will be read soon, a few cache lines at a time between blocks of arithmetic: their
// rows lie pages apart, which no hardware prefetcher follows, and more requests at once than the core tracks stall it.
struct Prefetch {
  const char *row;
  long stride, lines, left;  // left: cache lines to go
  long line = 0;
  Prefetch(const FormixTensor &t, int64_t type, long b, long h, long first, long n, int channels)
      : row(row_of(t, type, b, h, first)), stride(t.token * element_size(type)),
        lines((channels * element_size(type) + 63) / 64), left(n > 0 ? n * lines : 0) {}
  void some(long count) {
    for (; count > 0 && left > 0; count--, left--) {
      __builtin_prefetch(row + line * 64);
      if (++line == lines) line = 0, row += stride;
    }
  }
};
