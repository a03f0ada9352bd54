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

// Instruction sets, best first. `reason`: why it cannot run on this machine with this library, empty if it can.
__attribute__((visibility("default"))) int formix_isa_count();
__attribute__((visibility("default"))) const char *formix_isa_name(int index);
__attribute__((visibility("default"))) const char *formix_isa_reason(int index);
// Forces an instruction set by name; "auto" goes back to the best one. Returns 0, or 1 if it cannot run here.
__attribute__((visibility("default"))) int formix_set_isa(const char *name);
__attribute__((visibility("default"))) const char *formix_isa();
// From now on kernels run on the threads of the process's OpenMP runtime, before on the calling one alone. Returns 0, or 1 if
// there is none.
__attribute__((visibility("default"))) int formix_use_threads();

// All return 0, or 1 when memory could not be had.
__attribute__((visibility("default"))) int formix_pointwise_forward(const FormixPointwise *);
__attribute__((visibility("default"))) int formix_pointwise_backward(const FormixPointwise *);
__attribute__((visibility("default"))) int formix_l1_forward(const FormixL1 *);
__attribute__((visibility("default"))) int formix_l1_backward(const FormixL1 *);

// Calls like an earlier one (repeat.cpp). `void *` without a name are Python objects, borrowed; a function that returns one
// gives a new reference, or null with an exception set. Python's global lock must be held.
struct FormixPython {
  const void *exchange;  // DLPack's exchange API of torch.Tensor
  void *(*save_thread)();  // PyEval_SaveThread, PyEval_RestoreThread, Py_IncRef, PyErr_SetString, PyErr_Clear
  void (*restore_thread)(void *);
  void (*increment)(void *);
  void (*set_error)(void *type, const char *message);
  void (*clear_error)();
  void *none, *memory_error;
};
struct FormixKept;  // a call: what its tensors have to be, and the kernel with its arguments
// Returns 0, or 1 if the exchange API is of a version that formix does not know.
__attribute__((visibility("default"))) int formix_use_python(const FormixPython *);
// A call, before `next` in a list; null if there is no such thing for these tensors. `arguments` are `words` of eight bytes,
// with addresses of query, key, value, mask and output at `places`.
__attribute__((visibility("default"))) FormixKept *formix_keep(FormixKept *next, void *query, void *key, void *value,
                                                               void *mask, void *out, int (*kernel)(const void *),
                                                               const void *arguments, int64_t words, const int64_t *places);
// The call in a list that these tensors fit, or null.
__attribute__((visibility("default"))) const FormixKept *formix_find(const FormixKept *first, void *query, void *key,
                                                                     void *value, void *mask);
// Its output, or None.
__attribute__((visibility("default"))) void *formix_repeat(const FormixKept *first, void *query, void *key, void *value,
                                                           void *mask);
__attribute__((visibility("default"))) void formix_forget(FormixKept *first);  // the whole list
}
