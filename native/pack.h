// Reading strided rows of any type and laying them out for gemm.h. Everything is padded with zeros to whole vectors.
#pragma once
#include "formix.h"
#include "gemm.h"

static INLINE int round_up(int n, int step) { return (n + step - 1) / step * step; }
static INLINE long element_size(int64_t type) { return type == FORMIX_F32 ? 4 : 2; }
static INLINE const char *row_of(const FormixTensor &t, int64_t type, long b, long h, long n) {
  return (const char *)t.data + (b * t.batch + h * t.head + n * t.token) * element_size(type);
}

// Elements d ... d + W of a row, as floats.
static INLINE vf read_whole(const void *row, int64_t type, int d) {
  if (type == FORMIX_F32) return load((const float *)row + d);
  const vh x = *(const vh_at *)((const uint16_t *)row + d);
  return type == FORMIX_BF16 ? from_bf16(x) : from_f16(x);
}
// The same of a row of n; zeros past its end.
static INLINE vf read_floats(const void *row, int64_t type, int n, int d) {
  if (d + W <= n) return read_whole(row, type, d);
  if (type == FORMIX_F32) {
    float rest[W] = {};
    for (int i = 0; d + i < n; i++) rest[i] = ((const float *)row)[d + i];
    return load(rest);
  }
  uint16_t rest[W] = {};
  for (int i = 0; d + i < n; i++) rest[i] = ((const uint16_t *)row)[d + i];
  return read_whole(rest, type, 0);
}
static INLINE void write_row(void *target, int64_t type, int n, const float *from, float factor = 1) {
  int i = 0;
  if (type == FORMIX_F32) {
    auto p = (float *)target;
    for (; i + W <= n; i += W) store(p + i, load(from + i) * factor);
    for (; i < n; i++) p[i] = from[i] * factor;
  } else {
    auto p = (uint16_t *)target;
    auto narrow = [&](vf x) { return type == FORMIX_BF16 ? to_bf16(x * factor) : to_f16(x * factor); };
    for (; i + W <= n; i += W) *(vh_at *)(p + i) = narrow(load(from + i));
    if (i < n) {
      float rest[W] = {};
      for (int j = 0; i + j < n; j++) rest[j] = from[i + j];
      vh x = narrow(load(rest));
      for (int j = 0; i + j < n; j++) p[i + j] = x[j];
    }
  }
}

// Units d ... d + W of a row of n channels: floats, or bf16 pairs (the input is bf16 then, and keeps its bits).
template <class T> static INLINE vu read_vector(const void *row, int64_t type, int n, int d) {
  if constexpr (T::per_unit == 1) return (vu)read_floats(row, type, n, d);
  auto p = (const uint16_t *)row + 2 * d;
  if (2 * (d + W) <= n) return load((const uint32_t *)p);
  uint16_t rest[2 * W] = {};
  for (int i = 0; 2 * d + i < n; i++) rest[i] = p[i];
  return load((const uint32_t *)rest);
}
template <class T> static INLINE void read_units(const void *source, int64_t type, int n, int padded, typename T::unit *to) {
  int d = 0;
  if (T::per_unit == 2 || type == FORMIX_F32)  // whole vectors as they are
    for (; T::per_unit * (d + W) <= n; d += W) store((uint32_t *)to + d, load((const uint32_t *)source + d));
  for (; d < padded; d += W) store((uint32_t *)to + d, read_vector<T>(source, type, n, d));
}

// Rows [n][channels] -> panels [n / NR][units of channels][NR]: B for a product over channels (scores, dO V^T).
// Tiles are multiplied whole, so with them the units of channels are padded with zeros to TILE.
template <class T> static INLINE int units_of(long channels) {
  const int units = (channels + T::per_unit - 1) / T::per_unit;
  return T::tiles ? round_up(units, W) : units;
}
template <class T>
static void pack_transposed(const FormixTensor &t, int64_t type, long b, long h, long first, int n, int channels,
                            typename T::unit *to) {
  using unit = typename T::unit;
  const int units = units_of<T>(channels);
  const char *row = row_of(t, type, b, h, first);
  const long stride = t.token * element_size(type);
  for (int j = 0; j < round_up(n, T::tiles ? NR : W); j += W, row += W * stride) {
    unit *panel = to + (long)(j / NR) * units * NR + j % NR;
    int d = 0;
#if defined(__AVX512F__)
    if ((T::per_unit == 2 || type == FORMIX_F32) && j + W <= n)
      for (; T::per_unit * (d + W) <= channels; d += W) transpose_from(row + 4 * d, stride, (uint32_t *)panel + d * NR, NR);
#endif
    for (; d < units; d += W) {
      vu block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; r++)
        block[r] = j + r < n ? read_vector<T>(row + r * stride, type, channels, d) : vu{};
      transpose(block);
      if (d + W <= units)
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store((uint32_t *)panel + (d + i) * NR, block[i]);
      else
        for (int i = 0; i < units - d; i++) store((uint32_t *)panel + (d + i) * NR, block[i]);
    }
  }
}

// W elements of two rows of bf16, side by side; elements d ... d + W, zeros past the end of rows of n.
static INLINE vu pair_of(const uint16_t *low, const uint16_t *high) {
  return widen(*(const vh_at *)low) | (widen(*(const vh_at *)high) << 16);
}
static INLINE vu read_pair(const void *low, const void *high, int n, int d) {
  auto a = (const uint16_t *)low + d, b = (const uint16_t *)high + d;
  if (d + W <= n) return pair_of(a, b);
  uint16_t rest[2][W] = {};
  for (int i = 0; d + i < n; i++) rest[0][i] = a[i], rest[1][i] = b[i];
  return pair_of(rest[0], rest[1]);
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
  alignas(64) static const uint16_t nothing[2 * 256] = {};  // as many zeros as a row has bytes
  const char *start = row_of(t, type, b, h, first);
  const long stride = t.token * element_size(type);
  auto row = [&](long j) -> const void * {
    return j < n && !padding.masked(first + j) ? start + j * stride : (const char *)nothing;
  };
  for (int j = 0; j < n; j += T::per_unit) {
    const void *low = row(j), *high = row(j + 1);
    uint32_t *put = (uint32_t *)to + j / T::per_unit * ld;
    int d = 0;
    // without a look at the rows' end
    if constexpr (T::per_unit == 2)
      for (; d + W <= channels; d += W, put += W) store(put, pair_of((const uint16_t *)low + d, (const uint16_t *)high + d));
    else if (type == FORMIX_F32)
      for (; d + W <= channels; d += W, put += W) store((float *)put, load((const float *)low + d));
    for (; d < padded; d += W, put += W) {
      if constexpr (T::per_unit == 1)
        store(put, read_vector<T>(low, type, channels, d));
      else
        store(put, read_pair(low, high, channels, d));
    }
  }
}

#if defined(FORMIX_TILES)
// Rows [n][channels] of bf16 -> [channels / 16][tiles][16 units][16]: the right operand of a product over tokens, as tiles;
// `block` units lie between 16 channels and the next 16. Of every whole 32 channels, position x holds paired(x).
static void pack_tiles(const FormixTensor &t, long b, long h, long first, int n, int channels, uint32_t *to, long block) {
  alignas(64) static const uint16_t nothing[2 * W] = {};
  const long stride = t.token * 2;
  for (int d = 0; d < channels; to += block) {
    const int left = channels - d;
    const char *low = row_of(t, FORMIX_BF16, b, h, first) + 2 * d;
    auto pack = [&](auto put) {
      for (int j = 0; j < n; j += 2, low += 2 * stride) put(j / 2 * W, low, j + 1 < n ? low + stride : (const char *)nothing);
    };
    if (left >= 2 * W) {
      pack([&](int at, const char *low, const char *high) {
        vu pairs[2];
        pair_rows_mixed(load((const uint32_t *)low), load((const uint32_t *)high), pairs);
        store(to + at, pairs[0]), store(to + block + at, pairs[1]);
      });
      d += 2 * W, to += block;
    } else {
      pack([&](int at, const char *low, const char *high) { store(to + at, read_pair(low, high, left, 0)); });
      d += W;
    }
  }
}
// Row by row what a product with those gave, times a factor.
static INLINE void write_unmixed(void *target, int channels, const float *from, float factor) {
  int d = 0;
  for (; d + 2 * W <= channels; d += 2 * W)
    store((uint32_t *)target + d / 2, bf16_unmixed(load(from + d) * factor, load(from + d + W) * factor));
  if (d < channels) write_row((uint16_t *)target + d, FORMIX_BF16, channels - d, from + d, factor);
}
#endif

// [n][ld] -> [columns][LDA]: tiles want the rows of a product on their left.
static inline void transpose_units(const uint32_t *from, long ld, int n, int columns, uint32_t *to) {
  for (int d = 0; d < columns; d += W)
    for (int i = 0; i < n; i += W) {
      vu block[W];
      for (int r = 0; r < W; r++) block[r] = i + r < n ? load(from + (i + r) * ld + d) : vu{};
      transpose(block);
      for (int r = 0; r < W; r++) store(to + (long)(d + r) * LDA + i, block[r]);
    }
}

// A matrix [rows][padded] of floats, row i times first[i] and then second[i] -> units along its rows, as above.
template <class T>
static void pack_scaled(const float *from, int rows, int padded, const float *first, const float *second, typename T::unit *to) {
  auto row = [&](int i, int d) { return load(from + (long)i * padded + d) * first[i] * second[i]; };
  for (int i = 0; i < rows; i += T::per_unit)
    for (int d = 0; d < padded; d += W, to += W) {
      if constexpr (T::per_unit == 1)
        store(to, row(i, d));
      else
        store(to, bf16_bits(row(i, d)) | (i + 1 < rows ? bf16_bits(row(i + 1, d)) << 16 : vu{}));
    }
}
// The same of the transposed one, whose rows are padded to vectors too.
template <class T>
static void pack_scaled_transposed(const float *from, int rows, int columns, const float *first, const float *second,
                                   typename T::unit *to) {
  const int padded = round_up(columns, W), ld = round_up(rows, W);
  for (int d = 0; d < columns; d += W)
    for (int i = 0; i < rows; i += W) {
      vu block[W];
      for (int r = 0; r < W; r++)
        block[r] = i + r < rows ? (vu)(load(from + (long)(i + r) * padded + d) * first[i + r] * second[i + r]) : vu{};
      transpose(block);
      for (int r = 0; r < W && d + r < columns; r += T::per_unit) {
        typename T::unit *put = to + (long)(d + r) / T::per_unit * ld + i;
        if constexpr (T::per_unit == 1)
          store(put, (vf)block[r]);
        else
          store(put, bf16_bits((vf)block[r]) | (bf16_bits((vf)block[r + 1]) << 16));
      }
    }
}

// Asks for the memory of tokens that will be read soon, a few cache lines at a time between blocks of arithmetic: the rows
// of a head lie pages apart, which no hardware prefetcher follows, and more requests at once than the core tracks stall it.
// All heads of a token come before the next token.
struct Prefetch {
  const char *row = nullptr;
  long token = 0, head = 0, heads = 0, lines = 0, left = 0;  // strides in bytes; left: cache lines to go
  long h = 0, line = 0;
  Prefetch() = default;
  Prefetch(const FormixTensor &t, int64_t type, long b, long first_head, long heads, long first, long n, int channels)
      : row(row_of(t, type, b, first_head, first)), token(t.token * element_size(type)), head(t.head * element_size(type)),
        heads(heads), lines((channels * element_size(type) + 63) / 64), left(n > 0 ? n * heads * lines : 0) {}
  long some(long count) {  // how many of them were too many
    for (; count > 0 && left > 0; count--, left--) {
      __builtin_prefetch(row + h * head + line * 64, 0, 2);
      if (++line < lines) continue;
      line = 0;
      if (++h == heads) h = 0, row += token;
    }
    return count;
  }
};

// Several of them one after another, in equal shares.
struct Ahead {
  Prefetch memory[4];
  int count = 0, next = 0;
  long share = 0;
  void add(const Prefetch &more) { memory[count++] = more; }
  void spread(long shares) {
    for (int i = 0; i < count; i++) share += memory[i].left;
    share = (share + shares - 1) / shares;
  }
  void some() {
    for (long left = share; left > 0 && next < count; next += left > 0) left = memory[next].some(left);
  }
};
