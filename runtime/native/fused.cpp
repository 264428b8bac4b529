#include "fused.h"

#include <algorithm>

namespace edge_kv {
namespace {

constexpr int64_t kShare = 16 << 10;       // values of one task, some 10 us of them
constexpr int64_t kTaskBytes = 128 << 10;  // weights of one task: some 10 us at memory speed

// work(begin, count) for shares of `total` values.
template <class F>
void in_shares(const Pool& pool, int64_t total, int64_t share, F work) {
  parallel(pool, (total + share - 1) / share, [&](int64_t i) {
    work(i * share, std::min(share, total - i * share));
  });
}

}  // namespace

void norm_rows(const Kernels& kernels, const Pool& pool, const float* x, int64_t rows, int64_t dim,
               const float* weight, float eps, float* out) {
  in_shares(pool, rows, std::max<int64_t>(1, kShare / dim), [&](int64_t begin, int64_t count) {
    for (int64_t row = begin; row < begin + count; ++row)
      kernels.norm_rope(x + row * dim, weight, nullptr, nullptr, 0, Rotation::halves, int(dim), eps,
                        1.0f, out + row * dim);
  });
}

void gated_values(const Kernels& kernels, const Pool& pool, const float* gate, const float* up,
                  int64_t count, Activation activation, float limit, float* out) {
  in_shares(pool, count, kShare, [&](int64_t begin, int64_t n) {
    kernels.gated(gate + begin, up + begin, n, activation, limit, out + begin);
  });
}

void softcap(const Kernels& kernels, const Pool& pool, const float* x, int64_t count, float cap,
             float* out) {
  in_shares(pool, count, kShare,
            [&](int64_t begin, int64_t n) { kernels.softcap(x + begin, n, cap, out + begin); });
}

void linear_float(const Kernels& kernels, const Pool& pool, const float* x, int64_t tokens,
                  const float* rows, int64_t n_out, int64_t n_in, float* out) {
  const int64_t share = std::max<int64_t>(2, kTaskBytes / 4 / std::max<int64_t>(1, n_in) / 2 * 2);
  in_shares(pool, n_out, share, [&](int64_t begin, int64_t count) {
    kernels.float_rows(x, tokens, rows + begin * n_in, count, n_in, out + begin, n_out);
  });
}

}  // namespace edge_kv
