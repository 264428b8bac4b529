// Which kernels this CPU runs, decided once; and half precision, which all of them share.
#include <cstdlib>
#include <cstring>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "simd.h"

namespace edge_kv {

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512vnni;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
extern const Kernels kernels_dotprod;
#endif

const Kernels* find_kernels(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
  if (!strcmp(name, "avx512vnni"))
    return avx512 && __builtin_cpu_supports("avx512vnni") ? &kernels_avx512vnni : nullptr;
  if (!strcmp(name, "avx512")) return avx512 ? &kernels_avx512 : nullptr;
  if (!strcmp(name, "avx2")) return avx2 ? &kernels_avx2 : nullptr;
#elif defined(__aarch64__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  if (!strcmp(name, "dotprod"))
    return getauxval(AT_HWCAP) & kDotProducts ? &kernels_dotprod : nullptr;
  if (!strcmp(name, "neon")) return &kernels_neon;
#endif
  return strcmp(name, "scalar") ? nullptr : &kernels_scalar;
}

const Kernels& best_kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* asked = std::getenv("EDGE_KV_ISA");
    const char* order[] = {asked ? asked : "", "avx512vnni", "avx512", "avx2", "dotprod", "neon"};
    for (const char* name : order)
      if (const Kernels* found = find_kernels(name)) return *found;
    return kernels_scalar;
  }();
  return chosen;
}

float half_to_float(uint16_t half) { return half_bits_to_float(half); }

}  // namespace edge_kv
