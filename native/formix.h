// The C interface of formix's CPU kernels: what src/formix/ops/native.py loads with ctypes.
// Structures hold only int64_t, double and pointers, eight bytes each, so that Python can pack them with one struct.pack.
// Strides are in elements (bytes for masks), in the order batch, head, token; the channel stride is 1 everywhere.
#pragma once
#include <cstdint>

extern "C" {

enum FormixType : int64_t { FORMIX_F32 = 0, FORMIX_BF16 = 1, FORMIX_F16 = 2 };

enum FormixActivation : int64_t {
  FORMIX_RELU = 0, FORMIX_RELU2, FORMIX_GELU, FORMIX_GELU_ERF, FORMIX_SOFTPLUS, FORMIX_IDENTITY, FORMIX_RELU6,
  FORMIX_SIGMOID, FORMIX_SIGMOID_BIAS,
};

struct FormixTensor {  // [B, H, N, channels]
  void *data;
  int64_t batch, head, token;  // strides
};

struct FormixMask {  // bool [B, H, Nq, Nk]; a stride of 0 broadcasts; data is null when there is no mask
  const uint8_t *data;
  int64_t batch, head, query, key;
};

struct FormixPointwise {
  int64_t B, Hq, Hkv, Nq, Nk, D, Dv;
  int64_t type, activation, causal, threads;
  int64_t length;  // fixed L for all rows, or -1: the number of keys a row may see
  double scale, exponent;
  FormixTensor q, k, v, out;  // out is written by the forward and unused by the backward
  FormixMask mask;
  FormixTensor grad_out, grad_q, grad_k, grad_v;  // used by the backward only
};

struct FormixL1 {
  int64_t B, H, Nq, Nk, D, Dv;
  int64_t type, threads;
  double eps;
  FormixTensor q, k, v, out;
  FormixMask mask;  // [B, N], true: a real token; only batch and key strides are used
  int64_t mask_queries;  // the mask also removes query rows (self-attention)
  FormixTensor grad_out, grad_q, grad_k, grad_v;
};

// Instruction sets, best first. `built`: compiled into this library. `reason`: empty if it can run on this machine.
__attribute__((visibility("default"))) int formix_isa_count();
__attribute__((visibility("default"))) const char *formix_isa_name(int index);
__attribute__((visibility("default"))) const char *formix_isa_reason(int index);
// Forces an instruction set by name; "auto" goes back to the best one. Returns 0, or 1 if it cannot run here.
__attribute__((visibility("default"))) int formix_set_isa(const char *name);
__attribute__((visibility("default"))) const char *formix_isa();

// All return 0, or 1 when memory could not be had.
__attribute__((visibility("default"))) int formix_pointwise_forward(const FormixPointwise *);
__attribute__((visibility("default"))) int formix_pointwise_backward(const FormixPointwise *);
__attribute__((visibility("default"))) int formix_l1_forward(const FormixL1 *);
__attribute__((visibility("default"))) int formix_l1_backward(const FormixL1 *);
}
