// Work in parts, and who does which.
#pragma once

// How many parts to cut `pieces` pieces of work into so that `tasks` x parts keeps `threads` threads equally busy.
// `uneven`: parts differ in work (causal), so that there must be several for each thread if there are any.
static inline long parts_for(long tasks, long threads, long pieces, bool uneven) {
  long parts = 1;
  if (tasks % threads == 0) return parts;
  while (parts < pieces && tasks * parts < 8 * threads && (uneven || (tasks * parts) % threads != 0)) parts++;
  return parts;
}

// How many tasks a thread takes at a time. Short ones one after another, so that from call to call a thread meets the same
// rows, which its cache holds; long or uneven ones singly, so that no thread waits for the last.
static inline long tasks_at_once(long tasks, long threads, long tokens, bool uneven) {
  return uneven || tokens > 1024 ? 1 : (tasks + threads - 1) / threads;
}

// Equal blocks of at most `most`, in steps of `step`.
static inline long even_block(long n, long most, long step) {
  const long blocks = (n + most - 1) / most;
  return ((n + blocks - 1) / blocks + step - 1) / step * step;
}

// run() on each of several threads.
template <class Run> static inline void parallel(long threads, Run run) {
  formix::on_threads(threads, [](void *run) { (*(Run *)run)(); }, &run);
}

// Tasks 0 .. count, of which each thread that calls `each` takes `at_once` at a time while there are any.
struct Tasks {
  const long count, at_once;
  alignas(64) long next = 0;
  Tasks(long count, long at_once) : count(count), at_once(at_once) {}
  template <class Run> void each(Run run) {
    for (long task; (task = __atomic_fetch_add(&next, at_once, __ATOMIC_RELAXED)) < count;)
      for (const long end = least(count, task + at_once); task < end; task++) run(task);
  }
};
