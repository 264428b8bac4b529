// Which kernels this CPU runs, decided once; and half precision, which all of them share.
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace edge_kv {

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

const Kernels* find_kernels(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (!strcmp(name, "avx512"))
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")
               ? &kernels_avx512
               : nullptr;
  if (!strcmp(name, "avx2")) return avx2 ? &kernels_avx2 : nullptr;
#elif defined(__aarch64__)
  if (!strcmp(name, "neon")) return &kernels_neon;
#endif
  return strcmp(name, "scalar") ? nullptr : &kernels_scalar;
}

const Kernels& best_kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* asked = std::getenv("EDGE_KV_ISA");
    const char* order[] = {asked ? asked : "", "avx512", "avx2", "neon"};
    for (const char* name : order)
      if (const Kernels* found = find_kernels(name)) return *found;
    return kernels_scalar;
  }();
  return chosen;
}

float half_to_float(uint16_t half) { return half_bits_to_float(half); }

// Round to nearest even; overflow is infinity.
uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  if (bits >= 0x7f800000u) return uint16_t(sign | (bits > 0x7f800000u ? 0x7e00 : 0x7c00));
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00);
  if (bits < 0x38800000u) {  // subnormal: the float adder rounds at 2^-24
    float shifted;
    memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    memcpy(&bits, &shifted, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  const uint32_t odd = (bits >> 13) & 1;
  return uint16_t(sign | ((bits - 0x38000000u + 0xfff + odd) >> 13));
}

}  // namespace edge_kv
