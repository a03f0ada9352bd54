#pragma once
#include "formix.h"

namespace formix {
struct Kernels {
  int (*pointwise_forward)(const FormixPointwise *);
  int (*pointwise_backward)(const FormixPointwise *);
  int (*l1_forward)(const FormixL1 *);
  int (*l1_backward)(const FormixL1 *);
};
}  // namespace formix
