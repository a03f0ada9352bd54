// Calls like an earlier one, on PyTorch's tensors themselves: recognise them, allocate the output, run the kernel.
// What src/formix/ops/repeated.py does with it stands there.
//
// PyTorch publishes a table of C functions that look into a tensor and make one: DLPack's exchange API, version 1.3, in
// torch.Tensor.__dlpack_c_exchange_api__. The structures below are that standard's; Python's own functions come from ctypes.
// All of this runs under Python's global lock except the kernel itself.
#include <algorithm>
#include <cstring>
#include <memory>

#include "formix.h"

namespace {
struct Device {
  int32_t type, id;
};
constexpr Device CPU{1, 0};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {  // DLTensor
  void *data;
  Device device;
  int32_t dimensions;
  DataType type;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Version {
  uint32_t major, minor;
};
struct OwnedTensor {  // DLManagedTensorVersioned
  Version version;
  void *context;
  void (*free)(OwnedTensor *);
  uint64_t flags;
  Tensor tensor;
};
struct Exchange {  // DLPackExchangeAPI
  Version version;
  const void *older;
  int (*allocate)(const Tensor *like, OwnedTensor **, void *context,
                  void (*fail)(void *context, const char *kind, const char *message));
  void *from_python;
  int (*to_python)(OwnedTensor *, void **);
  int (*look)(void *, Tensor *);
  void *stream;
};
FormixPython python{};
const Exchange *exchange = nullptr;

constexpr int MOST_DIMENSIONS = 4;

// All of a tensor but its numbers. Compared as memory: no gaps, and zeros where there is no dimension.
struct Description {
  int64_t type = 0, dimensions = 0, shape[MOST_DIMENSIONS] = {}, strides[MOST_DIMENSIONS] = {};
};
// False for what no kernel takes: another device or layout, more dimensions, no memory. None has no data.
bool look(void *object, Tensor &t) {
  t = {};
  if (object == python.none) return true;
  if (exchange->look(object, &t)) return python.clear_error(), false;
  return t.device.type == CPU.type && t.dimensions <= MOST_DIMENSIONS && t.data;
}
Description describe(const Tensor &t) {
  Description d{t.type.code << 16 | t.type.bits << 8 | t.type.lanes, t.dimensions};
  std::copy_n(t.shape, t.dimensions, d.shape), std::copy_n(t.strides, t.dimensions, d.strides);
  return d;
}

constexpr int INPUTS = 4;  // query, key, value, mask
struct Inputs {
  Description known[INPUTS];
  void *data[INPUTS];
  bool read(void *const objects[INPUTS]) {
    for (int i = 0; i < INPUTS; i++) {
      Tensor t;
      if (!look(objects[i], t)) return false;
      known[i] = describe(t), data[i] = (char *)t.data + t.byte_offset;
    }
    return true;
  }
};

constexpr int MOST_WORDS = 96;
struct Words {
  int64_t word[MOST_WORDS];
};
static_assert(sizeof(Words) >= sizeof(FormixPointwise) && sizeof(Words) >= sizeof(FormixL1), "arguments must fit");

void fail(void *, const char *, const char *message) { python.set_error(python.memory_error, message); }
}  // namespace

struct FormixKept {
  FormixKept *next;
  Description inputs[INPUTS], out;
  DataType out_type;
  int64_t out_elements = 1;
  int (*kernel)(const void *);
  Words arguments{};
  int64_t places[INPUTS + 1];  // of the addresses of query, key, value, mask and output among the words
};

namespace {
const FormixKept *find(const FormixKept *kept, const Inputs &inputs) {
  while (kept && memcmp(kept->inputs, inputs.known, sizeof inputs.known)) kept = kept->next;
  return kept;
}

void *run(const FormixKept &kept, void *const data[INPUTS]) {
  Tensor like{nullptr, CPU, 1, kept.out_type, const_cast<int64_t *>(&kept.out_elements), nullptr, 0};
  OwnedTensor *out;
  if (exchange->allocate(&like, &out, nullptr, fail)) return nullptr;
  out->tensor.dimensions = (int32_t)kept.out.dimensions;
  out->tensor.shape = const_cast<int64_t *>(kept.out.shape), out->tensor.strides = const_cast<int64_t *>(kept.out.strides);
  Words arguments = kept.arguments;
  for (int i = 0; i < INPUTS; i++)
    if (data[i]) memcpy(&arguments.word[kept.places[i]], &data[i], sizeof(void *));
  memcpy(&arguments.word[kept.places[INPUTS]], &out->tensor.data, sizeof(void *));
  void *thread = python.save_thread();
  const int failed = kept.kernel(&arguments);
  python.restore_thread(thread);
  if (failed) {
    out->free(out);
    python.set_error(python.memory_error, "The attention kernels could not allocate their working memory.");
    return nullptr;
  }
  void *object = nullptr;
  return exchange->to_python(out, &object) ? nullptr : object;
}
}  // namespace

int formix_use_python(const FormixPython *functions) {
  auto table = static_cast<const Exchange *>(functions->exchange);
  if (table->version.major != 1 || table->version.minor < 3 || !table->look) return 1;
  python = *functions, exchange = table;
  return 0;
}
FormixKept *formix_keep(FormixKept *next, void *query, void *key, void *value, void *mask, void *out,
                        int (*kernel)(const void *), const void *arguments, int64_t words, const int64_t *places) {
  void *const objects[INPUTS] = {query, key, value, mask};
  Inputs inputs;
  Tensor t;
  if (!inputs.read(objects) || !look(out, t)) return nullptr;
  auto kept = std::make_unique<FormixKept>();
  std::copy_n(inputs.known, INPUTS, kept->inputs);
  kept->out = describe(t), kept->out_type = t.type;
  for (int i = 0; i < t.dimensions; i++) kept->out_elements *= t.shape[i];
  kept->kernel = kernel;
  memcpy(&kept->arguments, arguments, size_t(words) * 8);
  std::copy_n(places, INPUTS + 1, kept->places);
  kept->next = next;
  return kept.release();
}
const FormixKept *formix_find(const FormixKept *first, void *query, void *key, void *value, void *mask) {
  void *const objects[INPUTS] = {query, key, value, mask};
  Inputs inputs;
  return inputs.read(objects) ? find(first, inputs) : nullptr;
}
void *formix_repeat(const FormixKept *first, void *query, void *key, void *value, void *mask) {
  void *const objects[INPUTS] = {query, key, value, mask};
  Inputs inputs;
  const FormixKept *kept = inputs.read(objects) ? find(first, inputs) : nullptr;
  if (kept) return run(*kept, inputs.data);
  python.increment(python.none);
  return python.none;
}
void formix_forget(FormixKept *first) {
  while (first) {
    FormixKept *next = first->next;
    delete first;
    first = next;
  }
}
