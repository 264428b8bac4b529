#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace edge_kv {
namespace {

constexpr int kBlockRows = 64;  // query rows of one task: its sums stay in the L2 cache
// Multiplications that are worth a thread, some 20 microseconds of them; reading a row counts as
// two queries.
constexpr int64_t kMinWork = 1 << 20;
constexpr int kReading = 2;

size_t element_bytes(Storage storage) {
  return storage == Storage::f32 ? 4 : storage == Storage::f16 ? 2 : 1;
}

}  // namespace

float* scratch(size_t floats) {
  constexpr size_t kLine = 64;  // bytes; a vector that spans two lines costs twice
  static thread_local std::vector<float> memory;
  if (memory.size() < floats + kLine / sizeof(float)) memory.resize(floats + kLine / sizeof(float));
  const auto at = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((at + kLine - 1) / kLine * kLine);
}

void store_rows(const Kernels& kernels, const Pool& pool, const Buffers& b, const Step& step,
                const float* k, const float* v, const float* k_norm, bool v_norm) {
  const size_t row_bytes = size_t(b.dim) * element_bytes(b.storage);
  float* rows = scratch(size_t(step.tokens) * b.dim);
  parallel(pool, step.tokens, [&](int64_t t) {
    const int64_t slot = (step.position + t) % b.slots;
    float* row = rows + t * b.dim;
    for (int h = 0; h < b.kv_heads; ++h) {
      const int64_t from = (t * b.kv_heads + h) * b.dim;
      const int64_t to = h * b.slots + slot;
      kernels.norm_rope(k + from, k_norm, step.cos + t * b.dim / 2, step.sin + t * b.dim / 2,
                        b.dim / 2, Rotation::halves, b.dim, step.eps, 1.0f, row);
      kernels.store(row, b.dim, b.storage, b.key_zero,
                    static_cast<char*>(b.keys) + size_t(to) * row_bytes,
                    b.key_scales ? b.key_scales + to : nullptr);
      const float* value = v + from;
      if (v_norm) {
        kernels.norm_rope(value, nullptr, nullptr, nullptr, 0, Rotation::halves, b.dim, step.eps,
                          1.0f, row);
        value = row;
      }
      kernels.store(value, b.dim, b.storage, 0,
                    static_cast<char*>(b.values) + size_t(to) * row_bytes,
                    b.value_scales ? b.value_scales + to : nullptr);
    }
  });
}

void attend_rows(const Kernels& kernels, const Pool& pool, const Buffers& b, const Step& step,
                 const float* q, int q_heads, const float* q_norm, int64_t window, float scale,
                 float* out) {
  const int dim = b.dim, group = q_heads / b.kv_heads, tokens = step.tokens;
  const size_t row_bytes = size_t(dim) * element_bytes(b.storage);
  // One task is a block of tokens of one KV head; where that leaves threads idle (decoding), the
  // keys are split too and the shares are merged at the end.
  const int block = std::max(1, kBlockRows / group);
  const int blocks = (tokens + block - 1) / block;
  const int64_t queries_of_task = int64_t(std::min(tokens, block)) * group;
  const int64_t work =
      2 * step.seen(window) * dim * b.kv_heads * blocks * (queries_of_task + kReading);
  const Pool team{int(std::min<int64_t>(pool.threads, std::max<int64_t>(1, work / kMinWork))),
                  pool.run};
  const int shares = (team.threads + blocks * b.kv_heads - 1) / (blocks * b.kv_heads);
  const int rows = block * group;
  const int64_t tasks = int64_t(b.kv_heads) * blocks * shares;

  const size_t query_floats = size_t(tokens) * q_heads * dim;
  const size_t partial_floats = size_t(rows) * (dim + 2);
  float* queries = scratch(query_floats + size_t(tasks) * partial_floats);
  float* partials = queries + query_floats;
  parallel(team, tokens, [&](int64_t t) {
    for (int h = 0; h < q_heads; ++h) {  // [kv_head, token, group, dim]: a block's rows adjoin
      const int64_t to = (int64_t(h / group) * tokens + t) * group + h % group;
      kernels.norm_rope(q + (t * q_heads + h) * dim, q_norm, step.cos + t * dim / 2,
                        step.sin + t * dim / 2, dim / 2, Rotation::halves, dim, step.eps, scale,
                        queries + to * dim);
    }
  });

  auto partial_of = [&](int64_t task) {
    float* at = partials + size_t(task) * partial_floats;
    return Partial{at, at + rows, at + 2 * rows};
  };
  parallel(team, tasks, [&](int64_t task) {
    const int share = int(task % shares), at = int(task / shares % blocks);
    const int head = int(task / shares / blocks);
    const int first = at * block, count = std::min(block, tokens - first);
    const Partial partial = partial_of(task);
    std::fill_n(partial.top, rows, kMasked);
    std::fill_n(partial.sum, rows, 0.0f);
    std::fill_n(partial.mix, size_t(count) * group * dim, 0.0f);
    const int64_t offset = int64_t(head) * b.slots;
    const Cache cache{static_cast<const char*>(b.keys) + size_t(offset) * row_bytes,
                      b.key_scales ? b.key_scales + offset : nullptr,
                      static_cast<const char*>(b.values) + size_t(offset) * row_bytes,
                      b.value_scales ? b.value_scales + offset : nullptr,
                      b.slots, dim, dim, 1, b.storage, b.key_zero};
    const int64_t position = step.position + first;
    const Queries mine{queries + (int64_t(head) * tokens + first) * group * dim, count * group,
                       group, position, window};
    const int64_t oldest = window ? std::max<int64_t>(0, position - window + 1) : 0;
    const int64_t keys = position + count - oldest;
    kernels.attend(cache, mine, oldest + keys * share / shares,
                   oldest + keys * (share + 1) / shares, partial);
  });

  parallel(team, tokens, [&](int64_t t) {
    for (int h = 0; h < q_heads; ++h) {
      const int64_t task = (int64_t(h / group) * blocks + t / block) * shares;
      const int64_t row = t % block * group + h % group;
      float top = kMasked, sum = 0.0f;
      for (int s = 0; s < shares; ++s) top = std::max(top, partial_of(task + s).top[row]);
      float* to = out + (t * q_heads + h) * dim;
      std::fill_n(to, dim, 0.0f);
      for (int s = 0; s < shares; ++s) {
        const Partial partial = partial_of(task + s);
        const float factor = std::exp(partial.top[row] - top);
        const float* mix = partial.mix + row * dim;
        sum += factor * partial.sum[row];
        for (int d = 0; d < dim; ++d) to[d] += factor * mix[d];
      }
      for (int d = 0; d < dim; ++d) to[d] /= sum;
    }
  });
}

}  // namespace edge_kv
