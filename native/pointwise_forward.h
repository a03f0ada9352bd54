// O_i = L_i^-a sum_j h(scale q_i . k_j) v_j (arXiv 2309.08586), without a tensor of scores.
//
// There is no row maximum or sum to carry, so a block of scores goes through h straight into the second product.
// Loops: keys in blocks that fit L2, packed once; inside, ROWS queries at a time; inside, blocks of scores.
#pragma once
#include "activation.h"
#include "mask.h"
#include "pack.h"
#include "parts.h"
#if defined(FORMIX_TILES)
#include "pointwise_tiles.h"
#endif
#include "memory.h"

// Gives `put` the weights h(scale * s + bias) of one row of n scores.
template <int ACT, class Put> static INLINE void weigh(const float *s, int n, float scale, float bias, Put put) {
  for (int j = 0; j < n; j += W) {
    vf unused;
    put(j, activation<ACT, false>(load(s + j) * scale + bias, unused));
  }
}

// Query rows first_block * ROWS ... last_block * ROWS of the heads that share key head g, counted through those heads.
template <class T> struct PointwiseForward {
  using unit = typename T::unit;
#if defined(FORMIX_TILES)
  static constexpr int ROWS = T::tiles ? PANEL : 48;      // query rows of a block of scores
  static constexpr long L2_BUDGET = T::tiles ? 1200000 : 640000;  // bytes of packed keys and values: tiles come with 2 MB of L2
#else
  static constexpr int ROWS = 48;
  static constexpr long L2_BUDGET = 640000;
#endif
  const FormixPointwise &p;
  const long b, g;
  const int D, Dv, Dvp, units;
  const long group, blocks_per_head, first_block, last_block, held_blocks;
  const long block_keys;
  const bool one_block;  // of keys: a block of queries is done before the next begins
  const long keys_held, ld_v;
  // relu and the identity commute with a positive scale, which is applied at the end then. Floats are done after the first
  // product, whose store knows relu.
  const bool linear, relu_in_place;
  float after;  // the factor at the end, besides L^-a
  const long far;  // how often L2 would be filled: if several times, it pays with tiles to ask for rows and keys in time
  long next_b = -1, next_g = 0;  // whose keys this thread packs next; -1: nobody's
  unit *K, *V, *Q;
  float *S;
  unit *P;  // the weights; floats stay where the scores were
  float *O, *factor, *bias;
  struct {  // a block of queries whose output is complete but not written
    long h, i0;
    int rows = 0;
    const float *factor, *o;
  } finished;
  Ahead rows_ahead, keys_ahead;

  static long blocks_of(const FormixPointwise &p) { return p.Hq / p.Hkv * ((p.Nq + ROWS - 1) / ROWS); }

  PointwiseForward(const FormixPointwise &p, long b, long g, long part, long parts)
      : p(p), b(b), g(g), D(p.D), Dv(p.Dv), Dvp(round_up(Dv, W)), units(units_of<T>(D)), group(p.Hq / p.Hkv),
        blocks_per_head((p.Nq + ROWS - 1) / ROWS), first_block(blocks_of(p) * part / parts),
        last_block(blocks_of(p) * (part + 1) / parts), held_blocks(last_block - first_block),
        block_keys(greatest(1L, L2_BUDGET / ((units + (long)Dvp / T::per_unit) * 4 * KEYS)) * KEYS),
        one_block(p.Nk <= block_keys), keys_held(one_block ? round_up(p.Nk, NR) : block_keys),
        ld_v(T::tiles ? W : Dvp), linear(p.scale > 0 && (p.activation == FORMIX_RELU || p.activation == FORMIX_IDENTITY)),
        relu_in_place(linear && p.activation == FORMIX_RELU && T::per_unit == 1), after(linear ? (float)p.scale : 1.0f),
        far((p.Hq * p.Nq + p.Hkv * p.Nk) * p.B * (D + Dv) * element_size(p.type) / (p.threads * L2_BUDGET)) {}

  // Lays out the working memory; with memory = null only measures it.
  long lay_out(float *memory) {
    float *next = memory;
    auto take = [&](long n) { float *r = next; next += round_up(n, 16); return r; };
    K = (unit *)take(keys_held * units), V = (unit *)take((keys_held / T::per_unit + 1) * Dvp), Q = (unit *)take(ROWS * LDA);
    S = take(ROWS * LDA), P = (unit *)(T::per_unit == 1 ? S : take(ROWS * LDA));
    O = take((one_block ? 2 : held_blocks) * ROWS * Dvp), factor = take(held_blocks * ROWS), bias = take(held_blocks * ROWS);
    return next - memory;
  }

  long head_of(long block) const { return g * group + block / blocks_per_head; }

  void run() {
    typename T::session session;
    (void)session;
    for (long block = first_block; block < last_block;) {
      const long next = least(last_block, (block / blocks_per_head + 1) * blocks_per_head),
                 row = block % blocks_per_head * ROWS, at = (block - first_block) * ROWS;
      Visibility(p, b, head_of(block)).rows(p, row, least((next - block) * ROWS, p.Nq - row), factor + at, bias + at);
      block = next;
    }
    // No row of this part sees a key from here on.
    const bool one_head = first_block / blocks_per_head == (last_block - 1) / blocks_per_head;
    const long last_key = p.causal && one_head ? least(p.Nk, ((last_block - 1) % blocks_per_head + 1) * ROWS) : p.Nk;

    for (long k0 = 0; k0 < p.Nk; k0 += block_keys) {
      const long k1 = least(p.Nk, k0 + block_keys);
      if (k0 < last_key) pack_keys(k0, k1 - k0);
      if (T::tiles && far >= 4) {
        keys_ahead = next_keys(k1);
        keys_ahead.spread((last_block - first_block) * ((k1 - k0 + NR - 1) / NR));
      }
      long seen_head = -1;
      Visibility see(p, b, head_of(first_block));
      for (long block = first_block; block < last_block; block++) {
        const long h = head_of(block), i0 = block % blocks_per_head * ROWS, at = (block - first_block) * ROWS;
        const int rows = least((long)ROWS, p.Nq - i0);
        if (h != seen_head) see = Visibility(p, b, h), seen_head = h;
        float *o = O + (one_block ? block % 2 * ROWS : at) * Dvp;
        const long end = least(k1, see.limit_of(i0 + rows - 1));
        if (k0 == 0 && (!T::tiles || end == 0)) memset(o, 0, sizeof(float) * ROWS * Dvp);
        if (T::tiles && far >= 2) {
          rows_ahead = next_rows(block, k1 == p.Nk);
          rows_ahead.spread((k1 - k0 + NR - 1) / NR);
        }
        if (end > k0) accumulate(see, h, i0, rows, k0, end, bias + at, o);
        if (k1 < p.Nk) continue;
        write_finished();
        finished = {h, i0, rows, factor + at, o};
        if (!T::tiles) write_finished();
      }
    }
    write_finished();
  }

  // The keys and values that are packed after those before k1.
  Ahead next_keys(long k1) const {
    Ahead memory;
    const bool here = k1 < p.Nk;
    if (!here && next_b < 0) return memory;
    const long b = here ? this->b : next_b, g = here ? this->g : next_g, from = here ? k1 : 0;
    const long n = least(block_keys, p.Nk - from);
    memory.add({p.k, p.type, b, g, 1, from, n, D});
    memory.add({p.v, p.type, b, g, 1, from, n, Dv});
    return memory;
  }
  // The queries of the block after this one, and the rows that this one may write.
  Ahead next_rows(long block, bool writes) const {
    Ahead memory;
    auto add = [&](const FormixTensor &t, long block, int channels) {
      const long i0 = block % blocks_per_head * ROWS;
      memory.add({t, p.type, b, head_of(block), 1, i0, least((long)ROWS, p.Nq - i0), channels});
    };
    if (block + 1 < last_block) add(p.q, block + 1, D);
    if (writes) add(p.out, block, Dv);
    return memory;
  }

  void pack_keys(long k0, int n) const {
    pack_transposed<T>(p.k, p.type, b, g, k0, n, D, K);
    if constexpr (T::tiles) {  // as tiles, whole ones
      const long held = keys_held / T::per_unit, from = (n + 1) / 2, to = round_up(n, NR) / 2;
      pack_tiles(p.v, b, g, k0, n, Dv, V, ld_v * held);
      for (int d = 0; from < to && d < Dvp; d += W) memset(V + d * held + from * ld_v, 0, sizeof(unit) * ld_v * (to - from));
    } else {
      pack_rows<T>(p.v, p.type, b, g, k0, n, Dv, V);
    }
  }

  // Adds to o what keys k0 ... end give to `rows` queries from i0 on.
  void accumulate(const Visibility &see, long h, long i0, int rows, long k0, long end, const float *shift, float *o) {
    auto read_queries = [&](int ld) {
      for (int r = 0; r < rows; r++)
        read_units<T>(row_of(p.q, p.type, b, h, i0 + r), p.type, D, round_up(units, W), Q + r * ld);
    };
#if defined(FORMIX_TILES)
    if constexpr (T::tiles) {
      with_activation(p.activation, [&](auto act) {
        constexpr int ACT = decltype(act)::value;
        // Queries that fill tiles and are loaded once, to stay there, come from where they lie.
        const bool once = !Bf16Activation<ACT>::looked_up && units <= 2 * TILE && end - k0 <= TILE_KEYS;
        const bool copied = !once || D != 2 * units || rows % TILE != 0;
        const void *q = copied ? Q : (const void *)row_of(p.q, p.type, b, h, i0);
        const long ld_q = copied ? units * 4 : p.q.token * 2;
        if (copied) {
          read_queries(units);
          if (rows < PANEL) memset(Q + rows * units, 0, sizeof(unit) * (PANEL - rows) * units);
        }
        const bool plain = takes_raw_scores(p);
        const Bf16Activation<ACT> f(plain ? (float)p.scale : 1.0f);
        after = f.factor;
        const long step = even_block(end - k0, TILE_KEYS, PANEL);
        for (long j0 = k0; j0 < end; j0 += step) {
          const int n = least(step, end - j0);
          const unit *k = K + (j0 - k0) * units;
          auto soon = [&] { rows_ahead.some(), keys_ahead.some(); };
          auto weigh = [&](auto is_plain, auto two) {
            const TileWeights<ACT, is_plain.value, two.value> weights{f, see, i0, rows, j0, n, (float)p.scale, shift, P};
            if constexpr (!Bf16Activation<ACT>::looked_up) {  // whose time is that of the vectors
              if (units == TILE) return weights.template run_held<1>(q, ld_q, k, soon);
              if (units == 2 * TILE) return weights.template run_held<2>(q, ld_q, k, soon);
            }
            weights.run(units / TILE, Q, k, soon);
          };
          auto by_height = [&](auto is_plain) {
            rows > TILE ? weigh(is_plain, Constant<1>{}) : weigh(is_plain, Constant<0>{});
          };
          plain ? by_height(Constant<1>{}) : by_height(Constant<0>{});
          write_finished();
          tile_output(j0 == 0, rows, n, P, V + (j0 - k0) / 2 * ld_v, keys_held / 2, Dvp, o, Dvp);
        }
      });
      return;
    }
#endif
    read_queries(LDA);
    for (long j0 = k0; j0 < end; j0 += KEYS) {
      const int n = least((long)KEYS, end - j0);
      scores(see, i0, rows, j0, n, K + (j0 - k0) * units);
      weights(see, i0, rows, j0, n, shift);
      for (int r = 0; r < rows; r += MR) {  // O += P V
        const int m = least(MR, rows - r);
        const long k = see.causal ? greatest(0L, least((long)n, i0 + r + m - j0)) : n;
        for (int d = 0; d < Dv; d += NR)
          gemm_panel<T, false, ADD>(m, Dv - d, (k + T::per_unit - 1) / T::per_unit, P + r * LDA, 0,
                                    V + (j0 - k0) / T::per_unit * Dvp + d, Dvp, o + r * Dvp + d, Dvp);
      }
    }
  }

  void scores(const Visibility &see, long i0, int rows, long j0, int n, const unit *panel) const {  // S = Q K^T
    for (int j = 0; j < n; j += NR, panel += units * NR) {
      int from = 0;  // whole groups of rows that come before this panel's first key need nothing
      if (see.causal) from = greatest(0L, least((long)rows, (j0 + j - i0) / MR * MR));
      const unit *q = Q + from * LDA;
      float *s = S + from * LDA + j;
      if constexpr (T::per_unit == 1) {
        if (relu_in_place) {
          gemm_panel<T, false, SET_RELU>(rows - from, n - j, units, q, 0, panel, NR, s, LDA);
          continue;
        }
      }
      gemm_panel<T, false, SET>(rows - from, n - j, units, q, 0, panel, NR, s, LDA);
    }
  }

  void weights(const Visibility &see, long i0, int rows, long j0, int n, const float *shift) const {
    const int padded = round_up(n, W);
    const float scale = linear ? 1.0f : (float)p.scale;
    const bool masked = see.mask || (see.causal && j0 + n > i0 + 1), done = linear && T::per_unit == 1;
    if (done && !masked) return;
    with_activation(p.activation, [&](auto act) {
      for (int r = 0; r < rows; r++) {
        float *s = S + r * LDA;
        auto keep_float = [&](int j, vf w) { store(s + j, w); };
        if constexpr (T::per_unit == 1) {
          if (!done) weigh<decltype(act)::value>(s, padded, scale, shift[r], keep_float);
          if (masked) see.apply(i0 + r, j0, j0 + n, s);
        } else {
          auto *pairs = (uint16_t *)(P + r * LDA);
          auto narrow = [&](int j, vf w) { *(vh_at *)(pairs + j) = to_bf16(w); };
          if (masked) {
            weigh<decltype(act)::value>(s, padded, scale, shift[r], keep_float);
            see.apply(i0 + r, j0, j0 + n, s);
            for (int j = 0; j < padded; j += W) narrow(j, load(s + j));
          } else {
            weigh<decltype(act)::value>(s, padded, scale, shift[r], narrow);
          }
          if (n & 1) pairs[n] = 0;
        }
      }
    });
  }

  // With tiles it waits until the next block's weights are there: reading what tiles have just stored would hold up all else.
  void write_finished() {
    const float *o = finished.o;
    for (int r = 0; r < finished.rows; r++, o += Dvp) {
      void *out = (void *)row_of(p.out, p.type, b, finished.h, finished.i0 + r);
      const float by = finished.factor[r] * after;
#if defined(FORMIX_TILES)
      if constexpr (T::tiles) {
        write_unmixed(out, Dv, o, by);
        continue;
      }
#endif
      write_row(out, p.type, Dv, o, by);
    }
    finished.rows = 0;
  }
};

template <class T> static int pointwise_forward(const FormixPointwise &p) {
  const long pairs = p.B * p.Hkv, parts = parts_for(pairs, p.threads, PointwiseForward<T>::blocks_of(p), p.causal);
  const long at_once = tasks_at_once(pairs * parts, p.threads, greatest(p.Nq, p.Nk), p.causal && parts > 1);
  Tasks tasks(pairs * parts, at_once);
  int failed = 0;
  auto run = [&](long task) {
    const long part = parts - 1 - task % parts, pair = task / parts;  // causal: the longest part first
    PointwiseForward<T> forward(p, pair / p.Hkv, pair % p.Hkv, part, parts);
    const long next = task + (at_once > 1 ? 1 : p.threads);  // as a rule
    if (parts == 1 && next < pairs) forward.next_b = next / p.Hkv, forward.next_g = next % p.Hkv;
    auto *memory = (float *)formix::scratch(4 * forward.lay_out(nullptr));
    if (!memory) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    forward.lay_out(memory), forward.run();
  };
  parallel(p.threads, [&] { tasks.each(run); });
  return failed;
}
