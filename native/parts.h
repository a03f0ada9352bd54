#pragma once

// How many parts to cut `pieces` pieces of work into so that `tasks` x parts keeps `threads` threads equally busy.
// `uneven`: parts differ in work (causal), so that there must be several for each thread.
static inline long parts_for(long tasks, long threads, long pieces, bool uneven) {
  long parts = 1;
  while (parts < pieces && tasks * parts < 8 * threads && (uneven || (tasks * parts) % threads != 0)) parts++;
  return parts;
}
