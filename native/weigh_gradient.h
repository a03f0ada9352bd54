// From scores to what the products of the backward read: the step of pointwise_backward.h between its two pairs of products.
#pragma once
#include "activation_bf16.h"

struct RowScale {
  float factor, scale, bias;
};

// From raw scores s and dp = (dO V^T)_i: the weights into s and the score gradients into dp. n is whole vectors.
template <int ACT> static void weigh_gradient(float *s, float *dp, int n, RowScale r) {
  const float slope_factor = r.factor * r.scale;
  for (int j = 0; j < n; j += W) {
    vf slope, h = activation<ACT, true>(load(s + j) * r.scale + r.bias, slope);
    store(s + j, h * r.factor);
    store(dp + j, load(dp + j) * slope * slope_factor);
  }
}

#if defined(__AVX512BF16__)
// What s and dp hold, and so what is left to do: raw scores and a bias; raw scores for an h that knows the scale; the same,
// with factors that are equal for all rows and wait for the end; weights and gradients.
enum Scores { BIASED, PLAIN, UNIFORM, WEIGHED };

// The same of two rows straight into what the products of bf16 read: pairs of rows, and dS also by rows. MIXED: pairs lie
// in the order of `paired`.
template <int ACT, Scores SCORES, bool MIXED>
static void narrow_gradients(const Bf16Activation<ACT> &f, const float *s, const float *dp, long ld, int n, const RowScale *r,
                             uint32_t *P, uint32_t *dS_pairs, uint32_t *dS, long ld_dS) {
  constexpr bool gated = ACT == FORMIX_RELU && SCORES != WEIGHED;  // dS by the narrowed weights, 32 at a time
  vf factor[2], slope_factor[2];
  for (int i = 0; i < 2; i++)
    factor[i] = splat(r[i].factor * (SCORES == PLAIN ? f.factor : 1.0f)), slope_factor[i] = splat(r[i].factor * r[i].scale);
  for (int j = 0; j < n; j += 2 * W) {
    vu p[2], g[2];  // [row]
    for (int i = 0; i < 2; i++) {
      vf x[2], y[2];  // [half]
      for (int c = 0; c < 2; c++) {
        x[c] = load(s + i * ld + j + c * W), y[c] = load(dp + i * ld + j + c * W);
        if constexpr (SCORES == WEIGHED) continue;
        if constexpr (SCORES == BIASED) x[c] = x[c] * r[i].scale + r[i].bias;
        vf slope;
        x[c] = f(x[c], slope);
        if constexpr (!gated && ACT != FORMIX_IDENTITY) y[c] = y[c] * slope;
        if constexpr (SCORES != UNIFORM) x[c] = x[c] * factor[i], y[c] = y[c] * slope_factor[i];
      }
      p[i] = bf16_pair(x[0], x[1]), g[i] = bf16_pair(y[0], y[1]);
      if constexpr (gated) g[i] = keep_lanes(p[i], g[i]);
      store(dS + i * ld_dS + j / 2, g[i]);
    }
    vu pairs[2][2];
    MIXED ? pair_rows_mixed(p[0], p[1], pairs[0]) : pair_rows(p[0], p[1], pairs[0]);
    MIXED ? pair_rows_mixed(g[0], g[1], pairs[1]) : pair_rows(g[0], g[1], pairs[1]);
    for (int c = 0; c < 2; c++) store(P + j + c * W, pairs[0][c]), store(dS_pairs + j + c * W, pairs[1][c]);
  }
}
#endif
