// Pages cost time when they are first written, for a small attention more than its arithmetic.
#pragma once
#include <cstddef>

namespace formix {
// A 64-byte aligned block of at least `bytes`, valid until the same thread asks again: a thread keeps it from call to call.
// Null if there is no memory.
void *scratch(size_t bytes);
// Asks the system to give large memory that was not written yet in huge pages.
void prefer_huge_pages(void *data, size_t bytes);
}  // namespace formix
