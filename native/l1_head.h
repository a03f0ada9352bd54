// SimA (arXiv 2206.08898): O = Q diag(c) K^T V with c_j = 1 / (max(|q_:j|_1, eps) max(|k_:j|_1, eps)).
//
// K and V are read once: while a piece of K is in cache for K^T V its column sums are taken too. The D x Dv product is then
// scaled by c and applied to Q. Everything is summed in fp32; where there are bf16 instructions, c K^T V is rounded to bf16
// for the second product of bf16 inputs.
//
// With c_j = a_j b_j (a of the queries, b of the keys), M = diag(b) K^T V and G = diag(a) Q^T dO, the gradients are
//   dQ = dO M^T diag(a) + sign(Q) diag(u),  dK = V G^T diag(b) + sign(K) diag(w),  dV = K diag(b) G,
//   u_j = -(G M^T)_jj / |q_:j|_1,  w_j likewise with k; zero where eps is larger than the norm.
//
// K^T V and Q^T dO may leave fp32's range where M and G are far from it. They are then summed once more, with every channel
// of K or Q times a power of two that its norm gives, which rounds nothing.
#pragma once
#include "pack.h"

#if defined(FORMIX_TILES)
constexpr int TOKENS = 64;  // rows of a piece
#else
constexpr int TOKENS = 48;
#endif

template <class T> struct L1Head {  // one (batch, head)
  using unit = typename T::unit;
  static constexpr bool pairs = T::per_unit == 2;
  const FormixL1 &p;
  const long b, h;
  const int D, Dv, Dp, Dvp;  // ..p: padded to vectors
  Padding keys, queries;
  // Sums over tokens, of one part of them or all. Times the powers of two of k (M) and q (G) if the first number is not 0.
  float *shrunk_M, *shrunk_G;      // one each
  float *q_norm, *k_norm, *M, *G;  // [Dp], [Dp], [D][Dvp], [D][Dvp]: K^T V and Q^T dO
  // Products: what follows from them.
  unit *CM, *CG, *MtC, *GtC;  // [units of D][Dvp] twice, [units of Dv][Dp] twice
  float *u, *w;               // [Dp], [Dp]
  // Working memory.
  unit *left, *right;    // [TOKENS][LDA] each: a piece of two inputs
  float *rows;           // [TOKENS][LDA]: a piece of the output
  unit *turned;          // with tiles: `left` transposed, [Dp or Dvp][LDA]

  // What the forward does not need comes last.
  static long sums_size(const FormixL1 &p, bool backward) {
    const long matrix = p.D * round_up(p.Dv, W);
    return round_up(16 + (backward ? 2 : 1) * matrix + 2 * round_up(p.D, W), 16);
  }
  static long products_size(const FormixL1 &p, bool backward) {
    const long Dp = round_up(p.D, W), Dvp = round_up(p.Dv, W);
    return round_up(backward ? 2 * p.D * Dvp + 2 * p.Dv * Dp + 2 * Dp : p.D * Dvp, 16);
  }
  static long memory_size(const FormixL1 &p) {
    const long Dp = round_up(p.D, W), Dvp = round_up(p.Dv, W);
    return 3L * TOKENS * LDA + (T::tiles ? greatest(Dp, Dvp) * LDA : 0);
  }
  L1Head(const FormixL1 &p, long b, long h, float *sums, float *products, float *memory)
      : p(p), b(b), h(h), D(p.D), Dv(p.Dv), Dp(round_up(D, W)), Dvp(round_up(Dv, W)) {
    if (p.mask.data) keys = {p.mask.data + b * p.mask.batch, p.mask.key};
    if (p.mask_queries) queries = keys;
    shrunk_M = sums, shrunk_G = sums + 1, q_norm = sums + 16, k_norm = q_norm + Dp, M = k_norm + Dp, G = M + D * Dvp;
    CM = (unit *)products, CG = CM + D * Dvp, MtC = CG + D * Dvp, GtC = MtC + Dv * Dp;
    u = (float *)(GtC + Dv * Dp), w = u + Dp;
    left = (unit *)memory, right = left + TOKENS * LDA, rows = memory + 2 * TOKENS * LDA;
    turned = (unit *)(rows + TOKENS * LDA);
  }

  void read_rows(const FormixTensor &t, long first, int n, int channels, unit *to) const {
    const int units = (channels + T::per_unit - 1) / T::per_unit;
    for (int i = 0; i < n; i++)
      read_units<T>(row_of(t, p.type, b, h, first + i), p.type, channels, round_up(units, W), to + i * LDA);
  }
  void read_columns(const FormixTensor &t, long first, int n, int channels, const Padding &padding, unit *to) const {
    pack_rows<T>(t, p.type, b, h, first, n, channels, to, LDA, padding);
  }
  Prefetch prefetch(const FormixTensor &t, long first, long end, int channels) const {
    return {t, p.type, b, h, 1, first, least((long)TOKENS, end - first), channels};
  }
  void write(const FormixTensor &t, long first, int n, int channels, const Padding &padding) const {
    alignas(64) static const float zeros[256] = {};
    for (int i = 0; i < n; i++)
      write_row((void *)row_of(t, p.type, b, h, first + i), p.type, channels,
                padding.masked(first + i) ? zeros : rows + i * LDA);
  }

  // norm[j] += |x_:j|_1 over n tokens; KEEP: which are also laid out as read_columns does.
  template <bool KEEP>
  void add_norm(const FormixTensor &x, long first, int n, const Padding &padding, float *norm, unit *to = nullptr) const {
    alignas(64) static const uint16_t nothing[2 * 256] = {};  // as many zeros as a row has bytes
    const char *start = row_of(x, p.type, b, h, first);
    const long stride = x.token * element_size(p.type);
    auto row = [&](int i) { return i < n && !padding.masked(first + i) ? start + i * stride : (const char *)nothing; };
    auto add = [&](auto type, auto vectors, int d) {  // 4 vectors are whole
      constexpr int COUNT = decltype(vectors)::value;
      vf sum[COUNT] = {}, odd[COUNT] = {};
      for (int i = 0; i < n; i += T::per_unit) {
        const char *low = row(i), *high = pairs ? row(i + 1) : nullptr;
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) {
          vu value;
          if constexpr (pairs) {
            auto a = (const uint16_t *)low + d + c * W, b = (const uint16_t *)high + d + c * W;
            value = COUNT == 4 ? pair_of(a, b) : read_pair(low, high, D, d);
            sum[c] += vabs((vf)(value << 16)), odd[c] += vabs((vf)(value & 0xffff0000u));
          } else {
            value = (vu)(COUNT == 4 ? read_whole(low, type.value, d + c * W) : read_floats(low, type.value, D, d));
            sum[c] += vabs((vf)value);
          }
          if (KEEP) store((uint32_t *)to + i / T::per_unit * LDA + d + c * W, value);
        }
      }
      for (int c = 0; c < COUNT; c++) store(norm + d + c * W, load(norm + d + c * W) + (sum[c] + odd[c]));
    };
    auto add_all = [&](auto type) {
      int d = 0;
      for (; d + 4 * W <= D; d += 4 * W) add(type, Constant<4>{}, d);
      for (; d < Dp; d += W) add(type, Constant<1>{}, d);
    };
    switch (pairs ? FORMIX_BF16 : p.type) {
      case FORMIX_F32: add_all(Constant<FORMIX_F32>{}); break;
      case FORMIX_BF16: add_all(Constant<FORMIX_BF16>{}); break;
      default: add_all(Constant<FORMIX_F16>{});
    }
  }
  static constexpr int STEP = T::tiles ? 32 : MR;  // rows that a product takes at once
  static long outer_steps(long channels, long columns) {
    return (columns + NR - 1) / NR * ((channels + STEP - 1) / STEP);
  }
  // C [left channels][right padded] += X^T Y over n tokens, X in `left`, Y in `right`; memory that is needed next is asked
  // for meanwhile
  void add_outer(int channels, int columns, int n, float *c, Ahead &ahead) const {
    const int units = (n + T::per_unit - 1) / T::per_unit, ldc = round_up(columns, W);
    if constexpr (T::tiles) transpose_units((const uint32_t *)left, LDA, units, round_up(channels, W), (uint32_t *)turned);
    for (int d = 0; d < columns; d += NR)
      for (int i = 0; i < channels; i += STEP) {
        const int m = least(STEP, channels - i);
        if constexpr (T::tiles)
          gemm_panel<T, false, ADD>(m, columns - d, units, turned + i * LDA, 0, right + d, LDA, c + i * ldc + d, ldc);
        else
          gemm_panel<T, true, ADD>(m, columns - d, units, left + i, LDA, right + d, LDA, c + i * ldc + d, ldc);
        ahead.some();
      }
  }
  // to[n][ld] = left[n][channels] B, all the columns that B is padded to
  void multiply(int n, int channels, const unit *B, int columns, float *to, long ld, Prefetch soon) const {
    const int units = (channels + T::per_unit - 1) / T::per_unit;
    for (int d = 0; d < columns; d += NR)
      for (int i = 0; i < n; i += STEP) {
        gemm_panel<T, false, SET>(least(STEP, n - i), columns - d, units, left + i * LDA, 0, B + d, round_up(columns, W),
                                  to + i * ld + d, ld);
        soon.some(TOKENS * STEP / MR);
      }
  }

  // A power of two that makes a norm above 1 at most 1; of an infinite one it is the smallest normal number.
  static float power_of(float norm) {
    uint32_t bits;
    memcpy(&bits, &norm, 4);
    bits = (uint32_t)greatest(1, 253 - (int)(bits >> 23)) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return norm > 1 ? power : 1;
  }
  // to[j] = 1 / max(|x_:j|_1, eps), over the power of two that the channel has been multiplied by
  void factors(const float *norm, bool shrunk, float *to) const {
    const vf eps = splat((float)p.eps);
    for (int d = 0; d < Dp; d += W) store(to + d, 1.0f / vmax(eps, load(norm + d)));
    for (int j = 0; shrunk && j < D; j++) to[j] = 1.0f / (greatest((float)p.eps, norm[j]) * power_of(norm[j]));
  }
  static bool any(vi condition) {
    int any = 0;
    for (int i = 0; i < W; i++) any |= condition[i];
    return any;
  }
  // Is 1 / norm next to fp32's subnormal numbers, which bf16 instructions take for 0?
  bool large(const float *norm) const {
    vi above = vi{};
    for (int d = 0; d < Dp; d += W) above |= (vi)(load(norm + d) > 0x1p64f);
    return any(above);
  }
  bool finite(const float *product) const {
    const vu infinite = vu{} + 0x7f800000u;
    vi not_finite[2] = {};
    for (long i = 0; i < D * Dvp; i += W) not_finite[i / W & 1] |= (vi)(((vu)load(product + i) & infinite) == infinite);
    return !any(not_finite[0] | not_finite[1]);
  }
  // Every channel in `left` times its power of two. Rows of `left` hold `side` elements of a channel side by side.
  void shrink(int rows, int side, const float *norm) const {
    for (int i = 0; i < rows; i++)
      for (int d = 0; d < D; d++)
        for (int s = 0; s < side; s++)
          if constexpr (pairs) {
            char *at = (char *)(left + i * LDA) + 2 * (d * side + s);
            uint32_t bits = 0;
            memcpy((char *)&bits + 2, at, 2);
            float value;
            memcpy(&value, &bits, 4);
            value *= power_of(norm[d]);
            memcpy(at, (char *)&value + 2, 2);
          } else {
            left[i * LDA + d] *= power_of(norm[d]);
          }
  }
  // If the product X^T Y is not finite it is formed from all tokens anew, with the channels of X times their powers of two.
  void sum_again(const FormixTensor &x, const FormixTensor &y, long tokens, const Padding &padding, const float *norm,
                 float *product, float *shrunk) const {
    if (finite(product)) return;
    memset(product, 0, sizeof(float) * D * Dvp);
    Ahead nothing;
    for (long i = 0; i < tokens; i += TOKENS) {
      const int n = least((long)TOKENS, tokens - i);
      read_columns(x, i, n, D, padding, left);
      shrink((n + T::per_unit - 1) / T::per_unit, T::per_unit, norm);
      read_columns(y, i, n, Dv, padding, right);
      add_outer(D, Dv, n, product, nothing);
    }
    *shrunk = 1;
  }

  // Adds query tokens q0 .. q1 and key tokens k0 .. k1 to the sums.
  void sum(long q0, long q1, long k0, long k1, bool backward, Ahead &ahead) const {
    for (long i = k0; i < k1; i += TOKENS) {
      const int n = least((long)TOKENS, k1 - i);
      add_norm<true>(p.k, i, n, keys, k_norm, left);
      read_columns(p.v, i, n, Dv, keys, right);
      add_outer(D, Dv, n, M, ahead);
    }
    for (long i = q0; i < q1; i += TOKENS) {
      const int n = least((long)TOKENS, q1 - i);
      if (!backward) {
        add_norm<false>(p.q, i, n, queries, q_norm);
        continue;
      }
      add_norm<true>(p.q, i, n, queries, q_norm, left);
      read_columns(p.grad_out, i, n, Dv, queries, right);
      add_outer(D, Dv, n, G, ahead);
    }
  }

  // Of all tokens.
  void check_sums(bool backward) const {
    sum_again(p.k, p.v, p.Nk, keys, k_norm, M, shrunk_M);
    if (backward) sum_again(p.q, p.grad_out, p.Nq, queries, q_norm, G, shrunk_G);
  }

  // The small matrices that the tokens are multiplied by.
  void scale_sums(bool backward) const {
    alignas(64) float M_scale[256], G_scale[256], q_scale[256], k_scale[256], dot[256];
    factors(k_norm, *shrunk_M, M_scale);  // K^T V -> M
    if (!backward) {
      factors(q_norm, large(q_norm), q_scale);
      return pack_scaled<T>(M, D, Dvp, M_scale, q_scale, CM);
    }
    factors(q_norm, *shrunk_G, G_scale);  // Q^T dO -> G
    factors(k_norm, large(k_norm), k_scale);
    pack_scaled<T>(G, D, Dvp, G_scale, k_scale, CG);
    factors(q_norm, false, q_scale), factors(k_norm, false, k_scale);
    pack_scaled_transposed<T>(M, D, Dv, M_scale, q_scale, MtC);
    pack_scaled_transposed<T>(G, D, Dv, G_scale, k_scale, GtC);
    for (int j = 0; j < D; j++) {
      vf sum = vf{};
      for (int d = 0; d < Dvp; d += W)
        sum += (load(M + j * Dvp + d) * M_scale[j]) * (load(G + j * Dvp + d) * G_scale[j]);
      dot[j] = 0;
      for (int i = 0; i < W; i++) dot[j] += sum[i];
    }
    const float eps = (float)p.eps;
    for (int j = 0; j < Dp; j++) {
      u[j] = j >= D || q_norm[j] < eps ? 0.0f : -dot[j] / q_norm[j];
      w[j] = j >= D || k_norm[j] < eps ? 0.0f : -dot[j] / k_norm[j];
    }
  }

  // rows += sign(x) slope: what the norm over the tokens adds to a gradient
  void add_sign(const FormixTensor &x, long first, int n, const float *slope) const {
    for (int i = 0; i < n; i++) {
      const char *row = row_of(x, p.type, b, h, first + i);
      for (int d = 0; d < Dp; d += W) {
        vf value = read_floats(row, p.type, D, d), s = load(slope + d);
        vf signed_slope = (vf)((vu)s ^ ((vu)value & 0x80000000u));
        store(rows + i * LDA + d, load(rows + i * LDA + d) + keep(value != 0.0f, signed_slope));
      }
    }
  }

  void forward(long q0, long q1) const {
    const bool shrunk = large(q_norm);
    for (long i = q0; i < q1; i += TOKENS) {
      const int n = least((long)TOKENS, q1 - i);
      read_rows(p.q, i, n, D, left);
      if (shrunk) shrink(n, 1, q_norm);
      if (p.type == FORMIX_F32 && Dv % W == 0 && !queries.tokens) {  // straight to where it belongs
        multiply(n, D, CM, Dv, (float *)row_of(p.out, p.type, b, h, i), p.out.token, prefetch(p.out, i, q1, Dv));
        continue;
      }
      multiply(n, D, CM, Dv, rows, LDA, prefetch(p.out, i, q1, Dv));
      write(p.out, i, n, Dv, queries);
    }
  }
  void backward(long q0, long q1, long k0, long k1) const {
    for (long i = q0; i < q1; i += TOKENS) {
      const int n = least((long)TOKENS, q1 - i);
      read_rows(p.grad_out, i, n, Dv, left);
      multiply(n, Dv, MtC, D, rows, LDA, prefetch(p.grad_q, i, q1, D));
      add_sign(p.q, i, n, u);
      write(p.grad_q, i, n, D, queries);
    }
    const bool shrunk = large(k_norm);
    for (long i = k0; i < k1; i += TOKENS) {
      const int n = least((long)TOKENS, k1 - i);
      read_rows(p.k, i, n, D, left);
      if (shrunk) shrink(n, 1, k_norm);
      multiply(n, D, CG, Dv, rows, LDA, prefetch(p.grad_v, i, k1, Dv));
      write(p.grad_v, i, n, Dv, keys);
      read_rows(p.v, i, n, Dv, left);
      multiply(n, Dv, GtC, D, rows, LDA, prefetch(p.grad_k, i, k1, D));
      add_sign(p.k, i, n, w);
      write(p.grad_k, i, n, D, keys);
    }
  }
};
