// The gradients of pointwise attention. With s_ij = scale q_i . k_j (+ bias_i), f_i = L_i^-a, P_ij = f_i h(s_ij):
//   dV = P^T dO,  dS_ij = f_i scale h'(s_ij) (dO V^T)_ij,  dQ = dS K,  dK = dS^T Q.
//
// Scores are computed again, so nothing of size Nq x Nk exists. Loops: a block of keys, packed once, whose dK and dV stay
// in cache; inside, all queries that see it, a block of rows at a time; inside, strips of keys, so that scores stay close.
// dQ is summed over key blocks in fp32.
//
// relu and the identity commute with a positive scale. With floats f_i scale is multiplied into dO then, so that neither P
// = max(q_i . k_j, 0) nor dS_ij = [P_ij > 0] (dO V^T)_ij needs a pass over the scores after the two products.
#pragma once
#include "pointwise_forward.h"
#include "weigh_gradient.h"

template <class T> struct PointwiseBackward {
  using unit = typename T::unit;
  static constexpr bool pairs = T::per_unit == 2;
  static constexpr int BLOCK = T::tiles ? 768 : 1024, SHORT = T::tiles ? 768 : KEYS, STRIP = T::tiles ? 192 : 96;  // keys
  static constexpr int ROWS = T::tiles ? 192 : 96;  // query rows of a block: the depth of the products P^T dO and dS^T Q
  static constexpr int STEP = T::tiles ? 32 : MR;  // rows; with tiles a block is filled up to whole ones with zeros
  const FormixPointwise &p;
  const long b, g, group;
  const int D, Dv, Dp, Dvp, units, units_v;
  const long block_keys, block_rows;
  // Where the scale and L^-a are multiplied in: with floats and a `folded` h, in dO; with tiles and `uniform` rows, at the
  // end, in what is written; else in P and dS.
  const bool plain, folded, uniform;
  const bool covered;  // all rows see all keys: the first product of a sum sets it, and nothing has to be zeroed before
  const bool in_place;  // floats in whole vectors are summed where they will be read
  float after_weights = 1, after_slopes = 1;
  long next_b = -1, next_g = 0;  // whose gradients this thread computes next; -1: nobody's
  // One block of keys.
  unit *Kt, *Vt, *K;  // panels [units of D][NR], panels [units of Dv][NR], rows [units of keys][Dp]
  float *dK, *dV;     // [keys][ld_k], [keys][ld_v]
  long ld_k, ld_v;
  float *dKt, *dVt;   // with tiles they are summed transposed: [D][keys], [Dv][keys]
  // One block of rows. Q and dO by row for products over channels; Qr and dOr for products over rows.
  unit *Q, *dO, *Qr, *dOr;
  unit *Qt, *dOt;  // with tiles: Qr and dOr transposed, [Dp][LDA], [Dvp][LDA]
  float *S, *dP;       // [rows][LDA]
  unit *Pt, *dSt, *dS;  // what the products read: pairs of rows, pairs of rows, rows
  long ld_q, ld_do;     // between rows of Qr and dOr
  float *factor, *bias;  // [group][Nq]
  float *dQ;             // [group][Nq][Dp]; null: in place, which pays when one block of keys is all
  mutable Ahead rows_ahead;

  static long keys_of(const FormixPointwise &p) {
    const long wanted = (p.threads + p.B * p.Hkv - 1) / (p.B * p.Hkv);  // blocks of each head, that every thread has one
    const long most = p.causal && wanted > 1 ? SHORT : BLOCK;  // of which early ones have more rows than late ones
    return even_block(p.Nk, least(most, greatest(4L * NR, (p.Nk + wanted - 1) / wanted)), NR);
  }
  static long query_gradient_size(const FormixPointwise &p) { return (p.Hq / p.Hkv * p.Nq + (T::tiles ? STEP : 0)) * round_up(p.D, W); }

  // Lays out the working memory; with memory = null only measures it. `query_gradient`: where dQ is, or null for here.
  long lay_out(float *memory, float *query_gradient) {
    float *next = memory;
    auto take = [&](long n) { float *r = next; next += (n + 15) / 16 * 16; return r; };
    Kt = (unit *)take(block_keys * units), Vt = (unit *)take(block_keys * units_v), K = (unit *)take(block_keys * Dp);
    if (!in_place) dK = take(block_keys * Dp), dV = take(block_keys * Dvp), ld_k = Dp, ld_v = Dvp;
    Q = (unit *)take(ROWS * LDA), dO = (unit *)take(ROWS * LDA);
    S = take(ROWS * LDA), dP = take(ROWS * LDA);
    if (pairs) {
      Qr = (unit *)take(ROWS / 2 * Dp), dOr = (unit *)take(ROWS / 2 * Dvp), ld_q = Dp, ld_do = Dvp;
      Pt = (unit *)take(ROWS / 2 * LDA), dSt = (unit *)take(ROWS / 2 * LDA), dS = (unit *)take(ROWS * LDA);
    } else {
      Qr = Q, dOr = dO, ld_q = ld_do = LDA;
      Pt = (unit *)S, dSt = dS = (unit *)dP;
    }
    if (T::tiles) {
      Qt = (unit *)take((long)Dp * LDA), dOt = (unit *)take((long)Dvp * LDA);
      dKt = take(D * block_keys), dVt = take(Dv * block_keys);
    }
    factor = take(group * p.Nq), bias = take(group * p.Nq);
    dQ = query_gradient || (in_place && block_keys >= p.Nk) ? query_gradient : take(query_gradient_size(p));
    return next - memory;
  }

  PointwiseBackward(const FormixPointwise &p, long b, long g)
      : p(p), b(b), g(g), group(p.Hq / p.Hkv), D(p.D), Dv(p.Dv), Dp(round_up(D, W)), Dvp(round_up(Dv, W)),
        units(units_of<T>(D)), units_v(units_of<T>(Dv)), block_keys(keys_of(p)),
        block_rows(even_block(p.Nq, ROWS, STEP)),
        plain(takes_raw_scores(p)),
        folded(!pairs && plain && (p.activation == FORMIX_RELU || p.activation == FORMIX_IDENTITY)),
        uniform(T::tiles && plain && !p.causal && !p.mask.data), covered(!p.causal && !p.mask.data && p.Nq > 0 && p.Nk > 0),
        in_place(!pairs && p.type == FORMIX_F32 && D % W == 0 && Dv % W == 0) {
#if defined(FORMIX_TILES)
    if (!uniform) return;
    float factor, bias;
    Visibility(p, b, g * group).rows(p, 0, 1, &factor, &bias);
    after_weights = factor * bf16_factor(p.activation, (float)p.scale), after_slopes = factor * (float)p.scale;
#endif
  }

  void read_rows(long h, long i0, int rows, const float *f) const {
    if constexpr (T::tiles)
      for (int r = rows; r < round_up(rows, STEP); r++)
        memset(Q + r * LDA, 0, sizeof(unit) * units), memset(dO + r * LDA, 0, sizeof(unit) * units_v);
    for (int r = 0; r < rows; r++) {
      read_units<T>(row_of(p.q, p.type, b, h, i0 + r), p.type, D, round_up(units, W), Q + r * LDA);
      const void *row = row_of(p.grad_out, p.type, b, h, i0 + r);
      if constexpr (pairs) {
        read_units<T>(row, p.type, Dv, round_up(units_v, W), dO + r * LDA);
      } else {
        const float factor = folded ? f[r] * (float)p.scale : 1.0f;
        for (int d = 0; d < Dv; d += W) store(dO + r * LDA + d, read_floats(row, p.type, Dv, d) * factor);
      }
    }
    if constexpr (pairs) {
      pack_rows<T>(p.q, p.type, b, h, i0, rows, D, Qr);
      pack_rows<T>(p.grad_out, p.type, b, h, i0, rows, Dv, dOr);
      if (T::tiles) {
        transpose_units(Qr, Dp, (rows + 1) / 2, Dp, Qt);
        transpose_units(dOr, Dvp, (rows + 1) / 2, Dvp, dOt);
      }
    }
  }

  // Calls of `some` for a block of rows and n keys.
  static long steps(long rows, long n) { return (T::tiles ? (rows + STEP - 1) / STEP : 1) * ((n + NR - 1) / NR); }
  // The rows from i0 on, or those that come after the last.
  Ahead next_rows(long e, long i0, bool again) const {
    Ahead memory;
    long b = this->b, h = g * group + e;
    if (i0 >= p.Nq) {
      i0 = 0;
      if (e + 1 < group)
        h++;
      else if (again)
        h = g * group;
      else if (next_b >= 0)
        b = next_b, h = next_g * group;
      else
        return memory;
    }
    const long n = least(block_rows, p.Nq - i0);
    memory.add({p.q, p.type, b, h, 1, i0, n, D});
    memory.add({p.grad_out, p.type, b, h, 1, i0, n, Dv});
    return memory;
  }

  // S and dP of `rows` rows (and those that fill up the tiles) and n keys from j0 on, which is key `first` of the block, then P and dS.
  void scores(const Visibility &see, long h_in_group, long i0, int rows, long j0, int n, long first) const {
    const int padded = round_up(n, pairs ? NR : W);  // tiles are multiplied whole, pairs narrowed by two vectors
    const int filled = T::tiles ? round_up(rows, STEP) : rows;
    const bool masked = see.mask || (see.causal && j0 + n > i0 + 1);
    const float *f = factor + h_in_group * p.Nq + i0, *c = bias + h_in_group * p.Nq + i0;
    auto scale_of = [&](int r) { return r < rows ? RowScale{f[r], (float)p.scale, c[r]} : RowScale{0, 0, 0}; };
#if defined(FORMIX_TILES)
    if constexpr (T::tiles)  // the zeros behind the last key give dS = 0, and a dV that nobody reads
      if (!masked && (n == padded || j0 + n == p.Nk)) return panels(filled, n, first, scale_of);
#endif
    for (int j = 0; j < n; j += NR) {
      rows_ahead.some();
      int from = 0;  // rows before this panel's first key
      if (see.causal) from = greatest(0L, least((long)rows, (j0 + j - i0) / STEP * STEP));
      const long panel = (first + j) / NR, at = from * LDA + j;
      const int columns = T::tiles ? NR : n - j;  // keys that fill up a tile are zeros
      if constexpr (!pairs)
        if (folded && p.activation == FORMIX_RELU) {
          gemm_panel<T, false, SET_RELU>(rows - from, columns, units, Q + from * LDA, 0, Kt + panel * units * NR, NR, S + at, LDA);
          gemm_panel<T, false, SET_GATED>(rows - from, columns, units_v, dO + from * LDA, 0, Vt + panel * units_v * NR, NR, dP + at,
                                          LDA, S + at);
          continue;
        }
      gemm_panel<T, false, SET>(filled - from, columns, units, Q + from * LDA, 0, Kt + panel * units * NR, NR, S + at, LDA);
      gemm_panel<T, false, SET>(filled - from, columns, units_v, dO + from * LDA, 0, Vt + panel * units_v * NR, NR, dP + at, LDA);
    }
    if (folded) {
      for (int r = 0; masked && r < rows; r++) see.apply(i0 + r, j0, j0 + n, S + r * LDA, dP + r * LDA);
      return;
    }
    auto weigh = [&](auto act) {
      for (int r = 0; r < rows; r++) {
        float *s = S + r * LDA, *dp = dP + r * LDA;
        weigh_gradient<decltype(act)::value>(s, dp, padded, scale_of(r));
        if (masked) see.apply(i0 + r, j0, j0 + n, s, dp);
        for (int j = n; j < padded; j++) s[j] = dp[j] = 0;
      }
    };
#if defined(__AVX512BF16__)
    if constexpr (pairs) {
      if (!T::tiles && rows % 2)
        memset(S + rows * LDA, 0, sizeof(float) * padded), memset(dP + rows * LDA, 0, sizeof(float) * padded);
      with_activation(p.activation, [&](auto act) {
        constexpr int ACT = decltype(act)::value;
        const bool weighed = masked || n < padded;
        if (weighed) {
          weigh(act);
          for (int r = rows; r < filled; r++)
            memset(S + r * LDA, 0, sizeof(float) * padded), memset(dP + r * LDA, 0, sizeof(float) * padded);
        }
        const Bf16Activation<ACT> h(plain ? (float)p.scale : 1.0f);
        auto narrow = [&](auto form) {
          for (int r = 0; r < filled; r += 2) {
            const RowScale two[2] = {scale_of(r), scale_of(r + 1)};
            narrow_gradients<ACT, (Scores)form.value, T::tiles>(h, S + r * LDA, dP + r * LDA, LDA, padded, two,
                                                                Pt + r / 2 * LDA, dSt + r / 2 * LDA, dS + r * LDA, LDA);
          }
        };
        weighed ? narrow(Constant<WEIGHED>{}) : plain ? narrow(Constant<PLAIN>{}) : narrow(Constant<BIASED>{});
      });
      return;
    }
#endif
    with_activation(p.activation, weigh);
  }

#if defined(FORMIX_TILES)
  // The same for keys that all rows see, a panel of 32 x 32 at a time, which stays in L1 until it is narrowed.
  template <class Scales> void panels(int filled, int n, long first, Scales scale_of) const {
    with_activation(p.activation, [&](auto act) {
      constexpr int ACT = decltype(act)::value;
      const Bf16Activation<ACT> h(plain ? (float)p.scale : 1.0f);
      auto narrow = [&](auto form) {
        for (int i = 0; i < filled; i += PANEL) {
          RowScale scales[PANEL];
          for (int r = 0; r < PANEL; r++) scales[r] = scale_of(i + r);
          for (int j = 0; j < n; j += PANEL) {
            rows_ahead.some();
            alignas(64) float s[PANEL * PANEL], dp[PANEL * PANEL];
            const long panel = (first + j) / NR, at = i / 2 * LDA + j;
            tile_block<true, false>(units / TILE, Q + i * LDA, LDA, Kt + panel * units * NR, NR, s, PANEL);
            tile_block<true, false>(units_v / TILE, dO + i * LDA, LDA, Vt + panel * units_v * NR, NR, dp, PANEL);
            for (int r = 0; r < PANEL; r += 2)
              narrow_gradients<ACT, (Scores)form.value, true>(h, s + r * PANEL, dp + r * PANEL, PANEL, PANEL, scales + r,
                                                              Pt + at + r / 2 * LDA, dSt + at + r / 2 * LDA,
                                                              dS + (i + r) * LDA + j / 2, LDA);
          }
        }
      };
      uniform ? narrow(Constant<UNIFORM>{}) : plain ? narrow(Constant<PLAIN>{}) : narrow(Constant<BIASED>{});
    });
  }

  // [channels][block_keys] -> [keys][ld], whole vectors. The keys of a panel come in the order of `paired`.
  void by_rows(const float *from, int channels, int keys, float *to, long ld) const {
    for (int d = 0; d < channels; d += W)
      for (int j = 0; j < round_up(keys, NR); j += W) {
        vu block[W];
        for (int r = 0; r < W; r++) block[r] = d + r < channels ? load((const uint32_t *)from + (d + r) * block_keys + j) : vu{};
        transpose(block);
        for (int r = 0; r < W; r++) store((uint32_t *)to + (j / NR * NR + paired(j % NR + r)) * ld + d, block[r]);
      }
  }
#endif

  float *row_in(const FormixTensor &t, long h, long n) const { return (float *)row_of(t, p.type, b, h, n); }
  void zero(float *to, long rows, long n, long ld) const {
    for (long r = 0; !covered && r < rows; r++) memset(to + r * ld, 0, sizeof(float) * n);
  }

  // The key blocks part, part + parts, ...: dK and dV of those are complete, dQ is their share.
  void run(long part, long parts) {
    typename T::session session;
    (void)session;
    if (dQ)
      zero(dQ, group * p.Nq, Dp, Dp);
    else
      for (long e = 0; e < group; e++) zero(row_in(p.grad_q, g * group + e, 0), p.Nq, D, p.grad_q.token);
    for (long e = 0; e < group; e++)
      Visibility(p, b, g * group + e).rows(p, 0, p.Nq, factor + e * p.Nq, bias + e * p.Nq);
    for (long j0 = part * block_keys; j0 < p.Nk; j0 += parts * block_keys) {
      const int held = least(block_keys, p.Nk - j0);
      pack_transposed<T>(p.k, p.type, b, g, j0, held, D, Kt);
      pack_transposed<T>(p.v, p.type, b, g, j0, held, Dv, Vt);
      pack_rows<T>(p.k, p.type, b, g, j0, held, D, K);
      if (T::tiles) memset(K + (held + 1) / 2 * Dp, 0, sizeof(unit) * (round_up(held, NR) / 2 - (held + 1) / 2) * Dp);
      if (in_place) {
        dK = row_in(p.grad_k, g, j0), ld_k = p.grad_k.token;
        dV = row_in(p.grad_v, g, j0), ld_v = p.grad_v.token;
      }
      if (T::tiles)
        zero(dKt, D, block_keys, block_keys), zero(dVt, Dv, block_keys, block_keys);
      else
        zero(dK, held, D, ld_k), zero(dV, held, Dv, ld_v);
      for (long e = 0; e < group; e++) {
        const long h = g * group + e;
        const Visibility see(p, b, h);
        const int n = least((long)held, see.limit - j0);
        if (n <= 0) continue;
        for (long i0 = see.causal ? j0 / block_rows * block_rows : 0; i0 < p.Nq; i0 += block_rows) {
          const int rows = least(block_rows, p.Nq - i0), filled = T::tiles ? round_up(rows, STEP) : rows,
                    row_units = (filled + T::per_unit - 1) / T::per_unit;
          const int seen = least((long)n, see.limit_of(i0 + rows - 1) - j0);
          if (seen <= 0) continue;
          read_rows(h, i0, rows, factor + e * p.Nq + i0);
          rows_ahead = next_rows(e, i0 + block_rows, j0 + parts * block_keys < p.Nk);
          rows_ahead.spread(steps(rows, seen));
          float *dq = dQ ? dQ + (e * p.Nq + i0) * Dp : row_in(p.grad_q, h, i0);
          const long ld_dq = dQ ? Dp : p.grad_q.token;
          const bool first = covered && e == 0 && i0 == 0;
          for (int s0 = 0; s0 < seen; s0 += STRIP) {
            const int strip = least(STRIP, seen - s0),
                      strip_units = (T::tiles ? round_up(strip, NR) : strip + T::per_unit - 1) / T::per_unit;
            scores(see, e, i0, rows, j0 + s0, strip, s0);
            if constexpr (T::tiles) {  // dV^T = dO^T P: AMX wants rows on the left, and P lies in pairs of rows
              for (int j = 0; j < strip; j += NR) {
                sum_panel<T, false>(first, Dv, NR, row_units, dOt, 0, Pt + j, LDA, dVt + s0 + j, block_keys);
                sum_panel<T, false>(first, D, NR, row_units, Qt, 0, dSt + j, LDA, dKt + s0 + j, block_keys);
              }
            } else {
              for (int d = 0; d < Dv; d += NR)
                sum_panel<T, true>(first, strip, Dv - d, row_units, Pt, LDA, dOr + d, ld_do, dV + s0 * ld_v + d, ld_v);
              for (int d = 0; d < D; d += NR)
                sum_panel<T, true>(first, strip, D - d, row_units, dSt, LDA, Qr + d, ld_q, dK + s0 * ld_k + d, ld_k);
            }
            for (int d = 0; d < D; d += NR)
              sum_panel<T, false>(covered && j0 == part * block_keys && s0 == 0, filled, D - d, strip_units, dS, 0,
                                  K + s0 / T::per_unit * Dp + d, Dp, dq + d, ld_dq);
          }
        }
      }
#if defined(FORMIX_TILES)
      if (T::tiles) by_rows(dKt, D, held, dK, Dp), by_rows(dVt, Dv, held, dV, Dvp);
#endif
      for (int j = 0; !in_place && j < held; j++) {
        write_row((void *)row_of(p.grad_k, p.type, b, g, j0 + j), p.type, D, dK + (long)j * Dp, after_slopes);
        write_row((void *)row_of(p.grad_v, p.type, b, g, j0 + j), p.type, Dv, dV + (long)j * Dvp, after_weights);
      }
    }
  }
  void write_query_gradient(long first, long last) const {  // rows of [group][Nq]
    for (long i = first; i < last; i++)
      write_row((void *)row_of(p.grad_q, p.type, b, g * group + i / p.Nq, i % p.Nq), p.type, D, dQ + i * Dp, after_slopes);
  }
};

template <class T> static int pointwise_backward(const FormixPointwise &p) {
  const long pairs = p.B * p.Hkv, rows = p.Hq / p.Hkv * p.Nq, block = PointwiseBackward<T>::keys_of(p);
  const long parts = parts_for(pairs, p.threads, (p.Nk + block - 1) / block, false);
  const long share = PointwiseBackward<T>::query_gradient_size(p);
  float *shares = nullptr;  // of dQ, when several tasks add to one
  if (parts > 1) {
    const long bytes = (4 * pairs * parts * share + 63) / 64 * 64;
    if (!(shares = (float *)aligned_alloc(64, bytes))) return 1;
    formix::prefer_huge_pages(shares, bytes);
  }
  const long at_once = tasks_at_once(pairs * parts, p.threads, greatest(p.Nq, p.Nk), p.causal && parts > 1);
  Tasks tasks(pairs * parts, at_once), pieces(pairs * p.threads, 1);
  int failed = 0;
  auto run = [&](long task) {
    const long pair = task / parts;
    PointwiseBackward<T> backward(p, pair / p.Hkv, pair % p.Hkv);
    const long next = task + (at_once > 1 ? 1 : p.threads);  // as a rule
    if (parts == 1 && next < pairs) backward.next_b = next / p.Hkv, backward.next_g = next % p.Hkv;
    float *own = shares ? shares + task * share : nullptr;
    auto *memory = (float *)formix::scratch(4 * backward.lay_out(nullptr, own));
    if (!memory) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    backward.lay_out(memory, own);
    backward.run(task % parts, parts);
    if (backward.dQ && !shares) backward.write_query_gradient(0, rows);
  };
  auto add_shares = [&](long piece) {
    const long pair = piece / p.threads, first = rows * (piece % p.threads) / p.threads,
               last = rows * (piece % p.threads + 1) / p.threads, width = round_up(p.D, W);
    float *total = shares + pair * parts * share;
    for (long part = 1; part < parts; part++)
      for (long i = first * width; i < last * width; i += W)
        store(total + i, load(total + i) + load(total + part * share + i));
    PointwiseBackward<T> backward(p, pair / p.Hkv, pair % p.Hkv);
    backward.dQ = total;
    backward.write_query_gradient(first, last);
  };
  parallel(p.threads, [&] {
    tasks.each(run);
    if (!shares) return;
    formix::meet();
    pieces.each(add_shares);
  });
  free(shares);
  return failed;
}
