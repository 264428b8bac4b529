#include "parallel.h"

#include <cstdint>
#include <vector>

namespace edge_kv {
namespace {

thread_local std::vector<float> memory;

}  // namespace

float* scratch(size_t floats) {
  constexpr size_t kLine = 64;  // bytes; a vector that spans two lines costs twice
  if (memory.size() < floats + kLine / sizeof(float)) memory.resize(floats + kLine / sizeof(float));
  const auto at = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((at + kLine - 1) / kLine * kLine);
}

}  // namespace edge_kv

void edge_kv_release_scratch() { std::vector<float>().swap(edge_kv::memory); }
