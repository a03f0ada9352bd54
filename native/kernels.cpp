// All kernels for one instruction set: CMake compiles this file once for each, with FORMIX_KERNELS naming the table.
// Everything but the table has internal linkage, so that no code of one instruction set is ever linked into another.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "formix.h"
#include "kernels.h"
#include "memory.h"
#include "threads.h"

namespace {
#include "pointwise_backward.h"
#include "pointwise_forward.h"
#include "l1.h"

int pointwise_forward_any(const FormixPointwise *p) {
#if defined(__AVX512BF16__)
  if (p->type == FORMIX_BF16) return pointwise_forward<Bf16>(*p);
#endif
  return pointwise_forward<Float>(*p);
}
int pointwise_backward_any(const FormixPointwise *p) {
#if defined(__AVX512BF16__)
  if (p->type == FORMIX_BF16) return pointwise_backward<Bf16>(*p);
#endif
  return pointwise_backward<Float>(*p);
}
template <bool BACKWARD> int l1_any(const FormixL1 *p) {
#if defined(__AVX512BF16__)
  if (p->type == FORMIX_BF16) return l1<Bf16, BACKWARD>(*p);
#endif
  return l1<Float, BACKWARD>(*p);
}
}  // namespace

namespace formix {
extern const Kernels FORMIX_KERNELS = {pointwise_forward_any, pointwise_backward_any, l1_any<false>, l1_any<true>};
}
