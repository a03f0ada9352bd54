// The functions h, and h', to bf16 accuracy: weights are narrowed to bf16 right after, so seven digits would be wasted.
//
// gelu(x) = max(x, -R) Phi(x), softplus and the sigmoid come from a quadratic on each of 31 intervals of [-R, R], whose
// coefficients lie in registers. Largest absolute errors, at scale 1: 4e-4 for the functions, 1e-3 for the derivatives
// (tests/ops/test_native.py); infinities give the limits, a NaN stays a NaN. The biased sigmoid, whose weights are about
// 1 / L, would be lost in such errors, and is computed.
#pragma once
#include <math.h>

#include "activation.h"

#if defined(__AVX512F__)
// c0 + x (c1 + x c2), one quadratic for all x nearest to (i - 15) R / 15, i = 0 ... 30; exactly 0
// and f's limit at the ends.
struct Quadratics {
  alignas(64) float c0[32], c1[32], c2[32];

  // `right`: what f is on the last interval, a constant or (slope 1) x itself.
  template <class F> Quadratics(double range, F f, double right, double right_slope = 0) {
    const double width = range / 15, step = width * 0.43301270189221932;  // Chebyshev's nodes: width / 2 * sqrt(3) / 2
    for (int i = 0; i < 32; i++) {
      const double m = (i - 15) * width, low = f(m - step), middle = f(m), high = f(m + step);
      const double b = (high - low) / (2 * step), a = (high - 2 * middle + low) / (2 * step * step);
      c0[i] = (float)(middle - b * m + a * m * m), c1[i] = (float)(b - 2 * a * m), c2[i] = (float)a;
    }
    c0[0] = c1[0] = c2[0] = c2[30] = 0;
    c0[30] = (float)right, c1[30] = (float)right_slope;
  }
  Quadratics(const Quadratics &q, float scale, float factor) {  // factor * q(scale * x)
    for (int i = 0; i < 32; i++) {
      c0[i] = q.c0[i] * factor, c1[i] = q.c1[i] * (factor * scale), c2[i] = q.c2[i] * (factor * scale * scale);
    }
  }
  INLINE vf at(vf x, float per_interval) const {  // |x| <= R
    const __m512i i = (__m512i)(x * per_interval + (8388608.0f + 15));  // 2^23: the low bits are the nearest integer
    auto look = [&](const float *c) {
      return (vf)_mm512_permutex2var_ps(_mm512_load_ps(c), i, _mm512_load_ps(c + 16));
    };
    return look(c0) + x * (look(c1) + x * look(c2));
  }
};

// What is looked up: for the GELUs Phi, so that h = x Phi(x), else h itself; and the slope h'.
template <int ACT> struct Lookup {
  static constexpr bool gelu = ACT == FORMIX_GELU || ACT == FORMIX_GELU_ERF;
  static constexpr double range = gelu ? 4.5 : 10;
  static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
  static double value(double x) {
    if (ACT == FORMIX_GELU) return sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x));
    if (ACT == FORMIX_GELU_ERF) return 0.5 * erfc(-x * 0.70710678118654752);
    return ACT == FORMIX_SOFTPLUS ? log1p(exp(x)) : sigmoid(x);
  }
  static double slope(double x) {
    const double e = 1e-4;
    return gelu ? ((x + e) * value(x + e) - (x - e) * value(x - e)) / (2 * e) : sigmoid(x);
  }
  Quadratics values{range, value, ACT == FORMIX_SOFTPLUS ? 0.0 : 1.0, ACT == FORMIX_SOFTPLUS ? 1.0 : 0.0},
      slopes{range, slope, 1};
  static const Lookup &get() {  // made at the first call, not at load: the processor may lack these instructions
    static const Lookup lookup;
    return lookup;
  }
};

// h(scale x) = factor * f(x); f is what the kernel computes, and the factor joins the one at the end: bf16_factor. scale > 0.
static INLINE float bf16_factor(int64_t activation, float scale) {
  return activation == FORMIX_SIGMOID ? 1 : activation == FORMIX_RELU2 ? scale * scale : scale;
}
template <int ACT, bool LOOKED_UP> struct ScaledLookup {
  explicit ScaledLookup(float) {}
};
template <int ACT> struct ScaledLookup<ACT, true> {
  const float range, per_interval;
  const Quadratics values, slopes;
  explicit ScaledLookup(float scale)
      : range((float)Lookup<ACT>::range / scale), per_interval(15 / range),
        values(Lookup<ACT>::get().values, scale, ACT == FORMIX_SOFTPLUS ? 1 / scale : 1),
        slopes(Lookup<ACT>::get().slopes, scale, 1) {}
  INLINE vf inside(vf x) const { return vmin(splat(range), vmax(splat(-range), x)); }
  INLINE vf value(vf x) const { return values.at(inside(x), per_interval); }
  INLINE vf slope(vf x) const { return slopes.at(inside(x), per_interval); }
};
constexpr bool is_looked_up(int activation) {
  return activation == FORMIX_GELU || activation == FORMIX_GELU_ERF || activation == FORMIX_SOFTPLUS || activation == FORMIX_SIGMOID;
}
template <int ACT> struct Bf16Activation : ScaledLookup<ACT, is_looked_up(ACT)> {
  static constexpr bool looked_up = is_looked_up(ACT), gelu = Lookup<ACT>::gelu;
  const float scale, factor;

  explicit Bf16Activation(float scale)
      : ScaledLookup<ACT, looked_up>(scale), scale(scale), factor(bf16_factor(ACT, scale)) {}

  INLINE vf operator()(vf x) const {
    if constexpr (gelu) return vmax(splat(-this->range), x) * this->value(x);
    if constexpr (ACT == FORMIX_SOFTPLUS) return vmax(this->value(x), x);
    if constexpr (ACT == FORMIX_SIGMOID) return this->value(x);
    if constexpr (ACT == FORMIX_RELU6) return vmin(splat(6 / scale), vmax(vf{}, x));
    vf unused;
    return activation<looked_up ? FORMIX_RELU : ACT, false>(x, unused);
  }
  INLINE vf operator()(vf x, vf &slope) const {  // slope: h' at scale x
    if constexpr (gelu || ACT == FORMIX_SOFTPLUS) {
      slope = this->ScaledLookup<ACT, true>::slope(x);
      return (*this)(x);
    }
    if constexpr (ACT == FORMIX_SIGMOID) {
      vf h = (*this)(x);
      slope = h * (1.0f - h);
      return h;
    }
    if constexpr (ACT == FORMIX_RELU2) {
      vf r = vmax(vf{}, x);
      slope = (2 * scale) * r;
      return r * r;
    }
    if constexpr (ACT == FORMIX_RELU6) {
      slope = keep((x > 0.0f) & (x < 6 / scale), splat(1.0f));
      return (*this)(x);
    }
    return activation<looked_up ? FORMIX_RELU : ACT, true>(x, slope);
  }
};
#endif
