#include "dense.h"

#include <algorithm>

namespace edge_kv {
namespace {

constexpr int64_t kTaskBytes = 128 << 10;  // weights of one task: some 10 us at memory speed
constexpr int64_t kTasksOfThread = 4;      // of tiles: each has memory for one
constexpr int64_t kManyTokens = 8;         // from here on, unpacking a tile takes less

struct Matrix {
  const uint8_t* packed;
  const float* scales;
  int64_t n_out, n_in;
  int bits;
  int64_t block;
};

uint8_t* scratch_bytes(size_t bytes) {
  return reinterpret_cast<uint8_t*>(scratch((bytes + sizeof(float) - 1) / sizeof(float)));
}

// One token after the other: every one streams the weights.
void each_token(const Kernels& kernels, const Pool& pool, const float* x, int64_t tokens,
                const Matrix& m, float* out) {
  auto* rounded = reinterpret_cast<int8_t*>(scratch_bytes(kernels.dense_bytes(m.bits, m.n_in)));
  const int64_t row_bytes = m.n_in * m.bits / 8;
  const int64_t share = std::max<int64_t>(8, kTaskBytes / row_bytes / 8 * 8);
  for (int64_t t = 0; t < tokens; ++t) {
    kernels.dense_round(x + t * m.n_in, m.n_in, m.bits, m.block, rounded);
    parallel(pool, (m.n_out + share - 1) / share, [&](int64_t i) {
      kernels.dense_rows(rounded, m.packed, m.scales, m.n_in, m.bits, m.block, i * share,
                         std::min(m.n_out, (i + 1) * share), out + t * m.n_out);
    });
  }
}

// One tile of weights after the other: every one meets all tokens.
void each_tile(const Kernels& kernels, const Pool& pool, const float* x, int64_t tokens,
               const Matrix& m, float* out) {
  const int64_t tiles = (m.n_out + kernels.tile_rows - 1) / kernels.tile_rows;
  const int64_t tasks = std::min<int64_t>(tiles, kTasksOfThread * pool.threads);
  const int64_t token_bytes = kernels.tile_token_bytes(m.n_in, m.block);
  const int64_t tile_bytes = kernels.tile_bytes(m.n_in, m.block);
  uint8_t* rounded = scratch_bytes(tokens * token_bytes + tasks * tile_bytes);
  uint8_t* unpacked = rounded + tokens * token_bytes;
  parallel(pool, tokens, [&](int64_t t) {
    kernels.tile_round(x + t * m.n_in, m.n_in, m.bits, m.block, rounded + t * token_bytes);
  });
  parallel(pool, tasks, [&](int64_t i) {
    for (int64_t tile = tiles * i / tasks; tile < tiles * (i + 1) / tasks; ++tile)
      kernels.tile_dense(rounded, tokens, m.packed, m.scales, m.n_out, m.n_in, m.bits, m.block,
                         tile * kernels.tile_rows, unpacked + i * tile_bytes, out);
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
