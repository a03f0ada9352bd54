// SimA over threads and caches: who sums and multiplies which heads and tokens. The mathematics stands in l1_head.h.
#pragma once
#include <stdlib.h>

#include "l1_head.h"
#include "memory.h"
#include "parts.h"

// What a thread does at a time: heads h0 .. h1 of one batch entry, some of its tokens. In a packed projection the heads of a
// token lie side by side, so the tokens are gone through in chunks that stay in L2, all heads of a chunk one after another.
template <class T> struct L1Work {
  const FormixL1 &p;
  const bool backward;
  const long b, h0, h1, q0, q1, k0, k1, chunk;
  long next_b = -1;  // the batch entry that this thread goes on with; -1: none
  float *sums, *products, *memory;  // of every head; of every head; of the one at work

  static constexpr long CHUNK_BYTES = 150000;
  L1Work(const FormixL1 &p, bool backward, long b, long h0, long h1, long part, long parts)
      : p(p), backward(backward), b(b), h0(h0), h1(h1), q0(token_of(p.Nq, part, parts)), q1(token_of(p.Nq, part + 1, parts)),
        k0(token_of(p.Nk, part, parts)), k1(token_of(p.Nk, part + 1, parts)), chunk(chunk_of(greatest(q1 - q0, k1 - k0))) {}

  // Tokens first .. of part i of `parts`, whole pieces.
  static long token_of(long tokens, long part, long parts) {
    const long pieces = (tokens + TOKENS - 1) / TOKENS;
    return least(tokens, pieces * part / parts * TOKENS);
  }
  long chunk_of(long tokens) const {  // equal ones
    const long bytes = (h1 - h0) * (2 * p.D + (backward ? 2 : 1) * p.Dv) * element_size(p.type);
    const long chunks = (tokens * bytes + CHUNK_BYTES - 1) / CHUNK_BYTES, pieces = (tokens + TOKENS - 1) / TOKENS;
    return greatest(1L, (pieces + chunks - 1) / greatest(1L, chunks)) * TOKENS;
  }
  long chunks() const { return (greatest(q1 - q0, k1 - k0) + chunk - 1) / chunk; }
  static long at(long first, long last, long offset) { return least(last, first + offset); }

  L1Head<T> head(long h) const {
    return {p, b, h, sums + (h - h0) * L1Head<T>::sums_size(p, backward),
            products + (h - h0) * L1Head<T>::products_size(p, backward), memory};
  }
  Ahead ahead(long offset) const {  // the chunk after the one at `offset`
    Ahead rows;
    const bool last_chunk = offset + chunk >= chunks() * chunk;
    if (last_chunk && next_b < 0) return rows;
    const long next = last_chunk ? 0 : offset + chunk, batch = last_chunk ? next_b : b;
    auto add = [&](const FormixTensor &t, long first, long last, int channels) {
      const long from = at(first, last, next), to = at(first, last, next + chunk);
      rows.add({t, p.type, batch, h0, h1 - h0, from, to - from, channels});
    };
    add(p.k, k0, k1, p.D), add(p.v, k0, k1, p.Dv), add(p.q, q0, q1, p.D);
    if (backward) add(p.grad_out, q0, q1, p.Dv);
    rows.spread(chunk / TOKENS * (backward ? 2 : 1) * (h1 - h0) * L1Head<T>::outer_steps(p.D, p.Dv));
    return rows;
  }

  void sum() const {
    memset(sums, 0, sizeof(float) * (h1 - h0) * L1Head<T>::sums_size(p, backward));
    for (long i = 0; i < chunks() * chunk; i += chunk) {
      Ahead rows = ahead(i);
      for (long h = h0; h < h1; h++)
        head(h).sum(at(q0, q1, i), at(q0, q1, i + chunk), at(k0, k1, i), at(k0, k1, i + chunk), backward, rows);
    }
  }
  void check() const {
    for (long h = h0; h < h1; h++) head(h).check_sums(backward);
  }
  void apply() const {
    for (long h = h0; h < h1; h++) head(h).scale_sums(backward);
    for (long i = 0; i < chunks() * chunk; i += chunk)
      for (long h = h0; h < h1; h++) {
        if (backward)
          head(h).backward(at(q0, q1, i), at(q0, q1, i + chunk), at(k0, k1, i), at(k0, k1, i + chunk));
        else
          head(h).forward(at(q0, q1, i), at(q0, q1, i + chunk));
      }
  }
};

template <class T, bool BACKWARD> static int l1(const FormixL1 &p) {
  using Head = L1Head<T>;
  // All heads of a batch entry together; short sequences that would leave threads idle by single heads.
  const long longest = greatest(p.Nq, p.Nk), groups = p.B % p.threads && longest < 1024 ? p.H : 1, heads = p.H / groups;
  const long parts = parts_for(p.B * groups, p.threads, (longest + 4 * TOKENS - 1) / (4 * TOKENS), false);
  const long tasks = p.B * groups * parts, at_once = tasks_at_once(tasks, p.threads, longest, false);
  const long sums_size = heads * Head::sums_size(p, BACKWARD), products_size = heads * Head::products_size(p, BACKWARD);
  float *sums = nullptr;  // of all tasks, if the parts of a sequence have to be added up
  if (parts > 1 && !(sums = (float *)malloc(4 * tasks * sums_size))) return 1;
  Tasks summing(tasks, at_once), adding(p.B * groups, 1), applying(tasks, 1);
  int failed = 0;
  parallel(p.threads, [&] {
    typename T::session session;
    (void)session;
    auto *memory = (float *)formix::scratch(4 * (Head::memory_size(p) + products_size + sums_size));
    if (!memory) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    auto work_of = [&](long task) {
      const long group = task / parts % groups;
      L1Work<T> work(p, BACKWARD, task / (parts * groups), group * heads, (group + 1) * heads, task % parts, parts);
      work.sums = sums ? sums + task * sums_size : memory;
      work.products = memory + sums_size, work.memory = work.products + products_size;
      return work;
    };
    if (memory)
      summing.each([&](long task) {
        L1Work<T> work = work_of(task);
        const long next = work.b + (at_once > 1 ? 1 : p.threads);  // as a rule
        if (parts == 1 && groups == 1 && next < p.B) work.next_b = next;
        work.sum();
        if (parts == 1) work.check(), work.apply();
      });
    if (parts == 1) return;
    formix::meet();
    if (memory)
      adding.each([&](long sequence) {  // the parts up in the first one
        const long first = sequence * parts;
        for (long i = 0; i < sums_size; i++)
          for (long part = 1; part < parts; part++) sums[first * sums_size + i] += sums[(first + part) * sums_size + i];
        work_of(first).check();
      });
    formix::meet();
    if (memory)
      applying.each([&](long task) {
        L1Work<T> work = work_of(task);
        work.sums = sums + task / parts * parts * sums_size;
        work.apply();
      });
  });
  free(sums);
  return failed;
}
