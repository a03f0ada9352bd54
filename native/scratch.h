// Working memory that a thread keeps from call to call: fresh pages would cost more than a small attention does.
#pragma once
#include <cstddef>

namespace formix {
// A 64-byte aligned block of at least `bytes`, valid until the same thread asks again. Null if there is no memory.
void *scratch(size_t bytes);
}  // namespace formix
