// The threads of the OpenMP runtime that PyTorch has brought into the process, by functions that GNU's and LLVM's both have.
// So all share one pool, whichever compiler built what, and a compiler without OpenMP loses nothing.
#pragma once

namespace formix {
// Calls run(argument) on `threads` threads, or fewer where there are not as many, and returns when all are done.
void on_threads(long threads, void (*run)(void *), void *argument);
// Inside: goes on when all of them are here.
void meet();
}  // namespace formix
