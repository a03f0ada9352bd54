// Chooses an instruction set when the library is loaded, and the C entry points.
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"
#include "memory.h"
#include "threads.h"
#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace formix {
#if defined(FORMIX_WITH_AMX_EMULATED)
extern const Kernels kernels_amx_emulated;
#endif
#if defined(FORMIX_WITH_AMX_BF16)
extern const Kernels kernels_amx_bf16;
#endif
#if defined(FORMIX_WITH_AVX512_BF16)
extern const Kernels kernels_avx512_bf16;
#endif
#if defined(FORMIX_WITH_AVX512)
extern const Kernels kernels_avx512;
#endif
#if defined(FORMIX_WITH_AVX2)
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_portable;

namespace {
#if defined(__x86_64__)
// What the processor has and the operating system saves on a context switch (XCR0).
struct Processor {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_bf16 = false;
  Processor() {
    unsigned a, b, c, d, b7 = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return;  // OSXSAVE
    const bool avx = c >> 28 & 1, fma = c >> 12 & 1;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c, &d)) return;
    avx2 = avx && fma && ymm && (b7 >> 5 & 1);
    avx512 = avx2 && zmm && (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1);  // F, DQ, BW, VL
    const bool tiles = (d >> 22 & 1) && (d >> 24 & 1) && (low >> 17 & 3) == 3;  // AMX-BF16, AMX-TILE
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512_bf16 = avx512 && (a >> 5 & 1);
#if defined(__linux__)
    // Linux gives a process the tiles' large state only when it asks: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
    amx_bf16 = tiles && avx512_bf16 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#endif
  }
};
const Processor processor;
#define HAS(x) processor.x
#else
#define HAS(x) false
#endif

struct Isa {
  const char *name;
  const Kernels *kernels;  // null: not in this build
  bool runs;
};
const Isa isas[] = {
#if defined(FORMIX_WITH_AMX_BF16)
    {"amx_bf16", &kernels_amx_bf16, HAS(amx_bf16)},
#else
    {"amx_bf16", nullptr, HAS(amx_bf16)},
#endif
#if defined(FORMIX_WITH_AVX512_BF16)
    {"avx512_bf16", &kernels_avx512_bf16, HAS(avx512_bf16)},
#else
    {"avx512_bf16", nullptr, HAS(avx512_bf16)},
#endif
#if defined(FORMIX_WITH_AVX512)
    {"avx512", &kernels_avx512, HAS(avx512)},
#else
    {"avx512", nullptr, HAS(avx512)},
#endif
#if defined(FORMIX_WITH_AVX2)
    {"avx2", &kernels_avx2, HAS(avx2)},
#else
    {"avx2", nullptr, HAS(avx2)},
#endif
    {"portable", &kernels_portable, true},
#if defined(FORMIX_WITH_AMX_EMULATED)  // after portable: never chosen by itself
    {"amx_emulated", &kernels_amx_emulated, HAS(avx512_bf16)},
#endif
};
constexpr int isa_count = sizeof isas / sizeof *isas;

const Isa *best() {
  for (const Isa &isa : isas)
    if (isa.kernels && isa.runs) return &isa;
  return nullptr;  // not reached: portable always runs
}
const Isa *chosen = best();

struct Memory {
  void *data = nullptr;
  size_t size = 0;
  ~Memory() { std::free(data); }
};
thread_local Memory memory;

void prefer_huge_pages(const FormixTensor &t, int64_t batch, int64_t heads, int64_t tokens, int64_t channels, int64_t type) {
  if (!t.data || !batch || !heads || !tokens) return;
  const int64_t elements = (batch - 1) * t.batch + (heads - 1) * t.head + (tokens - 1) * t.token + channels;
  formix::prefer_huge_pages(t.data, size_t(elements) * (type == FORMIX_F32 ? 4 : 2));
}
}  // namespace

void prefer_huge_pages(void *data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < size_t(4) << 20) return;
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), first = (size_t(data) + page - 1) / page * page,
               end = (size_t(data) + bytes) / page * page;
  madvise(reinterpret_cast<void *>(first), end - first, MADV_HUGEPAGE);  // only advice: where it is refused, nothing changes
#else
  (void)data, (void)bytes;
#endif
}

namespace {
void *runtime(const char *function) {
#if __has_include(<dlfcn.h>)
  return dlsym(RTLD_DEFAULT, function);
#else
  (void)function;
  return nullptr;
#endif
}
void (*parallel)(void (*run)(void *), void *argument, unsigned threads, unsigned flags);
void (*barrier)();
}  // namespace

void on_threads(long threads, void (*run)(void *), void *argument) {
  parallel && threads > 1 ? parallel(run, argument, unsigned(threads), 0) : run(argument);
}
void meet() {
  if (barrier) barrier();
}

void *scratch(size_t bytes) {
  if (bytes > memory.size) {
    std::free(memory.data);
    memory.size = (bytes + 4095) / 4096 * 4096;
    memory.data = std::aligned_alloc(4096, memory.size);
    if (!memory.data) memory.size = 0;
  }
  return memory.data;
}
}  // namespace formix

using namespace formix;

int formix_isa_count() { return isa_count; }
const char *formix_isa_name(int index) { return isas[index].name; }
const char *formix_isa_reason(int index) {
  const Isa &isa = isas[index];
  return !isa.kernels ? "the compiler that built formix cannot build it" : isa.runs ? "" : "this processor does not have it";
}
int formix_set_isa(const char *name) {
  if (!std::strcmp(name, "auto")) return chosen = best(), 0;
  for (const Isa &isa : isas)
    if (!std::strcmp(isa.name, name) && isa.kernels && isa.runs) return chosen = &isa, 0;
  return 1;
}
const char *formix_isa() { return chosen->name; }
int formix_use_threads() {
  parallel = reinterpret_cast<decltype(parallel)>(runtime("GOMP_parallel"));
  barrier = reinterpret_cast<decltype(barrier)>(runtime("GOMP_barrier"));
  if (parallel && barrier) return 0;
  parallel = nullptr, barrier = nullptr;
  return 1;
}

int formix_pointwise_forward(const FormixPointwise *p) {
  prefer_huge_pages(p->out, p->B, p->Hq, p->Nq, p->Dv, p->type);
  return chosen->kernels->pointwise_forward(p);
}
int formix_pointwise_backward(const FormixPointwise *p) {
  prefer_huge_pages(p->grad_q, p->B, p->Hq, p->Nq, p->D, p->type);
  prefer_huge_pages(p->grad_k, p->B, p->Hkv, p->Nk, p->D, p->type);
  prefer_huge_pages(p->grad_v, p->B, p->Hkv, p->Nk, p->Dv, p->type);
  return chosen->kernels->pointwise_backward(p);
}
int formix_l1_forward(const FormixL1 *p) {
  prefer_huge_pages(p->out, p->B, p->H, p->Nq, p->Dv, p->type);
  return chosen->kernels->l1_forward(p);
}
int formix_l1_backward(const FormixL1 *p) {
  prefer_huge_pages(p->grad_q, p->B, p->H, p->Nq, p->D, p->type);
  prefer_huge_pages(p->grad_k, p->B, p->H, p->Nk, p->D, p->type);
  prefer_huge_pages(p->grad_v, p->B, p->H, p->Nk, p->Dv, p->type);
  return chosen->kernels->l1_backward(p);
}
