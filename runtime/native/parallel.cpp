#include "parallel.h"

#include <cstdint>
#include <vector>

namespace edge_kv {

float* scratch(size_t floats) {
  constexpr size_t kLine = 64;  // bytes; a vector that spans two lines costs twice
  static thread_local std::vector<float> memory;
  if (memory.size() < floats + kLine / sizeof(float)) memory.resize(floats + kLine / sizeof(float));
  const auto at = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((at + kLine - 1) / kLine * kLine);
}

}  // namespace edge_kv
