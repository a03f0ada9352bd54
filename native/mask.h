// Which keys a row may see, and the two numbers that follow from it: L^-a and the bias of the biased sigmoid.
#pragma once
#include <math.h>

#include "formix.h"
#include "simd.h"

struct Visibility {  // for one (batch, query head)
  const uint8_t *mask = nullptr;  // the mask's row 0, or null if `limit` and `causal` say everything
  int64_t query_stride = 0, key_stride = 1;
  long limit;  // no row sees a key from here on
  long keys;   // Nk
  bool causal;

  Visibility(const FormixPointwise &p, long b, long h) : limit(p.Nk), keys(p.Nk), causal(p.causal) {
    if (!p.mask.data) return;
    mask = p.mask.data + b * p.mask.batch + h * p.mask.head;
    query_stride = p.mask.query, key_stride = p.mask.key;
    if (query_stride == 0) {  // a key-padding mask; usually a prefix, which is just a smaller Nk
      long last = keys;
      while (last > 0 && !mask[(last - 1) * key_stride]) last--;
      limit = last;
      if (count(mask, last) == last) mask = nullptr;
    }
  }
  long limit_of(long i) const { return causal ? least(i + 1, limit) : limit; }

  long count(const uint8_t *row, long n) const {
    long sum = 0;
    if (key_stride == 1)
      for (long j = 0; j < n; j++) sum += row[j] != 0;
    else
      for (long j = 0; j < n; j++) sum += row[j * key_stride] != 0;
    return sum;
  }

  // For rows first .. first + n: factor[i] = L_i^-a and bias[i] = -log L_i (0 unless the activation has a bias).
  void rows(const FormixPointwise &p, long first, long n, float *factor, float *bias) const {
    const uint8_t *counted = nullptr;
    long counted_to = -1, seen = 0, last_length = -1;
    float last_factor = 0, last_bias = 0;
    auto numbers_of = [&](long length) {
      if (length == last_length) return;
      const double l = length > 0 ? (double)length : 1.0;
      last_length = length;
      last_factor = (float)pow(l, -p.exponent);
      last_bias = p.activation == FORMIX_SIGMOID_BIAS ? (float)-log(l) : 0.0f;
    };
    if (p.length >= 0 || (!mask && !causal)) {  // the same for all
      numbers_of(p.length >= 0 ? p.length : limit);
      for (long i = 0; i < n; i++) factor[i] = last_factor, bias[i] = last_bias;
      return;
    }
    for (long i = 0; i < n; i++) {
      const long end = limit_of(first + i);
      if (!mask) {
        seen = end;
      } else {
        const uint8_t *row = mask + (first + i) * query_stride;
        if (row != counted || end < counted_to)
          seen = count(row, end);
        else
          seen += count(row + counted_to * key_stride, end - counted_to);
        counted = row, counted_to = end;
      }
      numbers_of(seen);
      factor[i] = last_factor;
      bias[i] = last_bias;
    }
  }

  // Bytes of row i for keys from .. to, contiguous (copied to `copy` if they are not in memory).
  const uint8_t *bytes(long i, long from, long to, uint8_t *copy) const {
    const uint8_t *row = mask + i * query_stride;
    if (key_stride == 1) return row + from;
    for (long j = from; j < to; j++) copy[j - from] = row[j * key_stride];
    return copy;
  }

  // Zeroes the weights x[from - origin .. to - origin) that row i may not see; columns past its causal limit included.
  template <class... Rows> void apply(long i, long from, long to, Rows... x) const {
    if (mask) {
      alignas(64) uint8_t copy[1024];
      const uint8_t *m = bytes(i, from, to, copy);
      long j = 0, n = to - from;
      for (; j + W <= n; j += W) {
        vi seen = (vi)(widen(*(const vb_at *)(m + j)) != 0u);
        (store(x + j, keep(seen, load(x + j))), ...);
      }
      for (; j < n; j++)
        if (!m[j]) ((x[j] = 0.0f), ...);
    }
    if (causal)
      for (long j = greatest(i + 1, from); j < to; j++) ((x[j - from] = 0.0f), ...);
  }
};
