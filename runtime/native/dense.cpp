#include "dense.h"

#include <algorithm>
#include <vector>

namespace edge_kv {
namespace {

constexpr int64_t kTaskBytes = 128 << 10;  // weights of one task: some 10 us at memory speed
constexpr int64_t kManyTokens = 8;         // from here on, unpacking a tile takes less

struct Matrix {
  const uint8_t* packed;
  const float* scales;
  int64_t n_out, n_in;
  int bits;
  int64_t block;
};

// One token after the other: every one streams the weights.
void each_token(const Kernels& kernels, const Pool& pool, const float* x, int64_t tokens,
                const Matrix& m, float* out) {
  static thread_local std::vector<int8_t> memory;
  memory.resize(kernels.dense_bytes(m.bits, m.n_in));
  const int64_t row_bytes = m.n_in * m.bits / 8;
  const int64_t share = std::max<int64_t>(8, kTaskBytes / row_bytes / 8 * 8);
  for (int64_t t = 0; t < tokens; ++t) {
    kernels.dense_round(x + t * m.n_in, m.n_in, m.bits, m.block, memory.data());
    parallel(pool, (m.n_out + share - 1) / share, [&, rounded = memory.data()](int64_t i) {
      kernels.dense_rows(rounded, m.packed, m.scales, m.n_in, m.bits, m.block, i * share,
                         std::min(m.n_out, (i + 1) * share), out + t * m.n_out);
    });
  }
}

// One tile of weights after the other: every one meets all tokens.
void each_tile(const Kernels& kernels, const Pool& pool, const float* x, int64_t tokens,
               const Matrix& m, float* out) {
  const int64_t token_bytes = kernels.tile_token_bytes(m.n_in, m.block);
  std::vector<uint8_t> rounded(tokens * token_bytes);
  parallel(pool, tokens, [&](int64_t t) {
    kernels.tile_round(x + t * m.n_in, m.n_in, m.bits, m.block, &rounded[t * token_bytes]);
  });
  parallel(pool, (m.n_out + kernels.tile_rows - 1) / kernels.tile_rows, [&](int64_t i) {
    static thread_local std::vector<uint8_t> tile;
    tile.resize(std::max<size_t>(tile.size(), kernels.tile_bytes(m.n_in, m.block)));
    kernels.tile_dense(rounded.data(), tokens, m.packed, m.scales, m.n_out, m.n_in, m.bits, m.block,
                       i * kernels.tile_rows, tile.data(), out);
  });
}

}  // namespace

void dense(const Kernels& kernels, const Pool& pool, const float* x, int64_t tokens,
           const uint8_t* packed, const float* scales, int64_t n_out, int64_t n_in, int bits,
           int64_t block, float* out) {
  const Matrix m{packed, scales, n_out, n_in, bits, block};
  if (tokens >= kManyTokens && kernels.tiles_fit(n_in, bits, block)) {
    each_tile(kernels, pool, x, tokens, m, out);
  } else if (kernels.dense_fits(n_in, bits, block)) {
    each_token(kernels, pool, x, tokens, m, out);
  } else {
    linear_packed(kernels, pool, x, tokens, packed, scales, n_out, n_in, bits, block, out);
  }
}

}  // namespace edge_kv
