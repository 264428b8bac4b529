#include "dense.h"

#include <algorithm>
#include <vector>

namespace edge_kv {
namespace {

constexpr int64_t kTaskBytes = 128 << 10;  // weights of one task: some 10 us at memory speed

}  // namespace

void dense(const Kernels& kernels, const Pool& pool, const float* x, int64_t tokens,
           const uint8_t* packed, const float* scales, int64_t n_out, int64_t n_in, int bits,
           int64_t block, float* out) {
  if (!kernels.dense_fits(n_in, bits, block)) {
    linear_packed(kernels, pool, x, tokens, packed, scales, n_out, n_in, bits, block, out);
    return;
  }
  static thread_local std::vector<int8_t> memory;
  memory.resize(kernels.dense_bytes(bits, n_in));
  const int64_t row_bytes = n_in * bits / 8;
  const int64_t share = std::max<int64_t>(8, kTaskBytes / row_bytes / 8 * 8);
  for (int64_t t = 0; t < tokens; ++t) {
    kernels.dense_round(x + t * n_in, n_in, bits, block, memory.data());
    parallel(pool, (n_out + share - 1) / share, [&, x_rounded = memory.data()](int64_t i) {
      kernels.dense_rows(x_rounded, packed, scales, n_in, bits, block, i * share,
                         std::min(n_out, (i + 1) * share), out + t * n_out);
    });
  }
}

}  // namespace edge_kv
