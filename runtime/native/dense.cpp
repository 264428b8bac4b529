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
  if (n_in % kernels.dense_step(bits) || !kernels.dense_fits(bits, block)) {
    linear_packed(kernels, pool, x, tokens, packed, scales, n_out, n_in, bits, block, out);
    return;
  }
  static thread_local std::vector<int8_t> memory;
  memory.resize(kernels.dense_bytes(bits, n_in));
  const int64_t row_bytes = n_in * bits / 8;
  const int64_t share = std::max<int64_t>(8, kTaskBytes / row_bytes / 8 * 8);
  struct Call {
    const Kernels& kernels;
    const void* x;
    const uint8_t* packed;
    const float* scales;
    int64_t n_out, n_in, block, share;
    int bits;
    float* out;
  };
  for (int64_t t = 0; t < tokens; ++t) {
    kernels.dense_round(x + t * n_in, n_in, bits, block, memory.data());
    Call call{kernels, memory.data(), packed, scales, n_out, n_in, block, share, bits,
              out + t * n_out};
    const int64_t shares = (n_out + share - 1) / share;
    const auto task = [](void* of, int64_t i) {
      const Call& c = *static_cast<Call*>(of);
      c.kernels.dense_rows(c.x, c.packed, c.scales, c.n_in, c.bits, c.block, i * c.share,
                           std::min(c.n_out, (i + 1) * c.share), c.out);
    };
    if (shares == 1 || pool.threads <= 1)
      for (int64_t i = 0; i < shares; ++i) task(&call, i);
    else
      pool.run(shares, task, &call);
  }
}

}  // namespace edge_kv
