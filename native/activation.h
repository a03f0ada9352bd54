// The functions h of pointwise attention and their derivatives on vectors.
//
// Largest errors against float64, over all finite floats (tests/ops/test_native.py measures them through the operator):
// exp 2e-7 relative; sigmoid, softplus and GELU 3e-7 of max(1, |h|); the exact GELU's erf is Abramowitz and
// Stegun 7.1.26, 1.5e-7 absolute. Infinities give the limits, a NaN stays a NaN.
#pragma once
#include "formix.h"
#include "simd.h"

// Whether h may take scores without their scale, which then goes into h's coefficients: they must not leave the range of
// floats.
static INLINE bool takes_raw_scores(const FormixPointwise &p) {
  return p.activation != FORMIX_SIGMOID_BIAS && p.scale > 1e-12 && p.scale < 1e12;
}

// e^x by Cephes' expf: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r, times 2^n.
static INLINE vf vexp(vf x) {
  x = vmin(splat(89.0f), vmax(splat(-104.0f), x));
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted = x * 1.44269504088896341f + magic;
  vf n = shifted - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vi exponent = (vi)shifted - (vi)magic, half = exponent >> 1;  // in two steps, so that 2^128 and subnormals come out right
  return p * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23);
#endif
}
// 1 / x for 1 <= x <= 2^126: 14 bits and a Newton step, 1e-7 relative, where that is faster than a division.
static INLINE vf vreciprocal(vf x) {
#if defined(__AVX512F__)
  vf y = (vf)_mm512_rcp14_ps((__m512)x);
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}
static INLINE vf vsigmoid(vf x) { return vreciprocal(1.0f + vexp(vmin(splat(87.0f), -x))); }

// log(1 + t) for 0 <= t <= 1: 2 atanh(s) with s = t / (2 + t) <= 1/3.
static INLINE vf vlog1p_unit(vf t) {
  vf s = t * vreciprocal(2.0f + t), z = s * s;
  vf p = splat(2.0f / 15);
  p = p * z + 2.0f / 13;
  p = p * z + 2.0f / 11;
  p = p * z + 2.0f / 9;
  p = p * z + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  return p * (z * s) + 2.0f * s;
}

// Phi(x), the normal distribution function, and e^(-x^2/2) which its derivative needs.
static INLINE vf vnormal_cdf(vf x, vf &gauss) {
  vf z = vmin(splat(30.0f), vabs(x)) * 0.70710678118654752f;
  vf t = vreciprocal(1.0f + 0.3275911f * z);
  gauss = vexp(-z * z);
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  vf tail = 0.5f * p * t * gauss;
  return x < 0.0f ? tail : 1.0f - tail;
}

// h(s), and h'(s) when asked for.
template <int ACT, bool GRAD> static INLINE vf activation(vf s, vf &slope) {
  const vf zero = vf{}, one = splat(1.0f);
  if constexpr (ACT == FORMIX_RELU) {
    if (GRAD) slope = keep(s > zero, one);
    return vmax(zero, s);
  } else if constexpr (ACT == FORMIX_RELU2) {
    vf r = vmax(zero, s);
    if (GRAD) slope = 2.0f * r;
    return r * r;
  } else if constexpr (ACT == FORMIX_RELU6) {
    if (GRAD) slope = keep((s > zero) & (s < 6.0f), one);
    return vmin(splat(6.0f), vmax(zero, s));
  } else if constexpr (ACT == FORMIX_IDENTITY) {
    if (GRAD) slope = one;
    return s;
  } else if constexpr (ACT == FORMIX_SIGMOID || ACT == FORMIX_SIGMOID_BIAS) {  // the caller has added the bias
    vf h = vsigmoid(s);
    if (GRAD) slope = h * (1.0f - h);
    return h;
  } else if constexpr (ACT == FORMIX_SOFTPLUS) {
    vf t = vexp(-vabs(s));
    if (GRAD) slope = (s < zero ? t : one) * vreciprocal(1.0f + t);
    return vmax(zero, s) + vlog1p_unit(t);
  } else if constexpr (ACT == FORMIX_GELU) {  // x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): the tanh form
    vf c = vmin(splat(50.0f), vmax(splat(-50.0f), s)), c2 = c * c;
    vf g = vsigmoid(1.5957691216057308f * c * (1.0f + 0.044715f * c2));
    if (GRAD) slope = g + c * g * (1.0f - g) * (1.5957691216057308f * (1.0f + 0.134145f * c2));
    return vmax(splat(-50.0f), s) * g;  // g is not quite 0 there, -inf would win
  } else {
    static_assert(ACT == FORMIX_GELU_ERF);
    vf gauss, cdf = vnormal_cdf(s, gauss);
    if (GRAD) slope = cdf + vmin(splat(30.0f), vmax(splat(-30.0f), s)) * 0.3989422804014327f * gauss;
    return vmax(splat(-30.0f), s) * cdf;
  }
}

// Calls f(integral constant of the activation).
template <class F> static INLINE void with_activation(int64_t act, F f) {
  switch (act) {
    case FORMIX_RELU: return f(Constant<FORMIX_RELU>{});
    case FORMIX_RELU2: return f(Constant<FORMIX_RELU2>{});
    case FORMIX_GELU: return f(Constant<FORMIX_GELU>{});
    case FORMIX_GELU_ERF: return f(Constant<FORMIX_GELU_ERF>{});
    case FORMIX_SOFTPLUS: return f(Constant<FORMIX_SOFTPLUS>{});
    case FORMIX_IDENTITY: return f(Constant<FORMIX_IDENTITY>{});
    case FORMIX_RELU6: return f(Constant<FORMIX_RELU6>{});
    case FORMIX_SIGMOID: return f(Constant<FORMIX_SIGMOID>{});
    default: return f(Constant<FORMIX_SIGMOID_BIAS>{});
  }
}
