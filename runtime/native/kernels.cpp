// The kernels of kernels.h for the instruction set this file is compiled for.
//
// Only functions of internal linkage and C headers are used: an inline function of the standard
// library compiled here could replace the portable copy of it in another object file.
#include "simd.h"

#include "kernels.h"

namespace edge_kv {
namespace {

constexpr int kTile = 64;  // keys whose scores are held at a time

float dot(const float* a, const float* b, int n) {
  Vec sum = splat(0.0f);
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) sum = multiply_add(load(a + i), load(b + i), sum);
  float rest = total(sum);
  for (; i < n; ++i) rest += a[i] * b[i];
  return rest;
}

// scores[r][j] = q[r] . keys[j] for R query rows and 2 keys, each key converted once.
template <int R, class E>
inline void dot_pair(const float* q, int dim, const E* key, float (*scores)[kTile], int j) {
  Vec first[R], second[R];
  for (int r = 0; r < R; ++r) first[r] = second[r] = splat(0.0f);
  int d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    const Vec a = load(key + d), b = load(key + dim + d);
    for (int r = 0; r < R; ++r) {
      const Vec x = load(q + r * dim + d);
      first[r] = multiply_add(x, a, first[r]);
      second[r] = multiply_add(x, b, second[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    float a = total(first[r]), b = total(second[r]);
    for (int i = d; i < dim; ++i) {
      a += q[r * dim + i] * value_of(key[i]);
      b += q[r * dim + i] * value_of(key[dim + i]);
    }
    scores[r][j] = a;
    scores[r][j + 1] = b;
  }
}

template <int R, class E>
inline void dot_single(const float* q, int dim, const E* key, float (*scores)[kTile], int j) {
  Vec sum[R];
  for (int r = 0; r < R; ++r) sum[r] = splat(0.0f);
  int d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    const Vec a = load(key + d);
    for (int r = 0; r < R; ++r) sum[r] = multiply_add(load(q + r * dim + d), a, sum[r]);
  }
  for (int r = 0; r < R; ++r) {
    float a = total(sum[r]);
    for (int i = d; i < dim; ++i) a += q[r * dim + i] * value_of(key[i]);
    scores[r][j] = a;
  }
}

// Turn the scores of one row into weights; returns the factor for what was summed before.
inline float soften(float* scores, int n, float* top, float* sum) {
  Vec high = splat(*top);
  int j = 0;
  for (; j + kWidth <= n; j += kWidth) high = larger(high, load(scores + j));
  float peak = largest(high);
  for (; j < n; ++j) peak = scores[j] > peak ? scores[j] : peak;
  const float keep = expf(*top - peak);
  const Vec shift = splat(peak);
  Vec mass = splat(0.0f);
  for (j = 0; j + kWidth <= n; j += kWidth) {
    const Vec w = exponential(sub(load(scores + j), shift));
    save(scores + j, w);
    mass = add(mass, w);
  }
  float all = total(mass);
  for (; j < n; ++j) all += scores[j] = expf(scores[j] - peak);
  *sum = *sum * keep + all;
  *top = peak;
  return keep;
}

// mix[r] = keep[r] * mix[r] + sum_j weights[r][j] * values[j]
template <int R, class E>
inline void mix_values(const float (*weights)[kTile], const float* keep, const E* values, int n,
                       int dim, float* mix) {
  int d = 0;
  for (; d + 2 * kWidth <= dim; d += 2 * kWidth) {
    Vec low[R], high[R];
    for (int r = 0; r < R; ++r) {
      const Vec k = splat(keep[r]);
      low[r] = mul(load(mix + r * dim + d), k);
      high[r] = mul(load(mix + r * dim + d + kWidth), k);
    }
    const E* v = values + d;
    for (int j = 0; j < n; ++j, v += dim) {
      const Vec a = load(v), b = load(v + kWidth);
      for (int r = 0; r < R; ++r) {
        const Vec w = splat(weights[r][j]);
        low[r] = multiply_add(w, a, low[r]);
        high[r] = multiply_add(w, b, high[r]);
      }
    }
    for (int r = 0; r < R; ++r) {
      save(mix + r * dim + d, low[r]);
      save(mix + r * dim + d + kWidth, high[r]);
    }
  }
  for (; d < dim; ++d)
    for (int r = 0; r < R; ++r) {
      float x = mix[r * dim + d] * keep[r];
      for (int j = 0; j < n; ++j) x += weights[r][j] * value_of(values[int64_t(j) * dim + d]);
      mix[r * dim + d] = x;
    }
}

struct Tile {
  int64_t position;  // of the first key
  int64_t slot;
  int count;
};

// Fold one tile into R query rows, the first of which is row `first` of `q`.
template <int R, class K, class V>
void fold(const Cache& cache, const Queries& q, int first, const Tile& tile, const Partial& out) {
  const int64_t oldest = q.position + first / q.group;
  const int64_t newest = q.position + (first + R - 1) / q.group;
  const int64_t last = tile.position + tile.count - 1;
  if (tile.position > newest || (q.window && last <= oldest - q.window)) return;
  alignas(64) float scores[R][kTile];
  const int dim = cache.dim;
  const float* rows = q.rows + int64_t(first) * dim;
  const K* keys = static_cast<const K*>(cache.keys) + tile.slot * dim;
  const V* values = static_cast<const V*>(cache.values) + tile.slot * dim;
  int j = 0;
  for (; j + 2 <= tile.count; j += 2) {
    if (first == 0)  // the values are next; later rows find them in the cache
      for (int b = 0; b < 2 * dim * int(sizeof(V)); b += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(values + int64_t(j) * dim) + b, 0, 2);
    dot_pair<R>(rows, dim, keys + int64_t(j) * dim, scores, j);
  }
  if (j < tile.count) dot_single<R>(rows, dim, keys + int64_t(j) * dim, scores, j);
  const bool edge = last > oldest || (q.window && tile.position <= newest - q.window);
  float keep[R];
  for (int r = 0; r < R; ++r) {
    if (cache.key_scales)
      for (int i = 0; i < tile.count; ++i) scores[r][i] *= cache.key_scales[tile.slot + i];
    if (edge) {
      const int64_t at = q.position + (first + r) / q.group;
      for (int i = 0; i < tile.count; ++i) {
        const int64_t key = tile.position + i;
        if (key > at || (q.window && key <= at - q.window)) scores[r][i] = kMasked;
      }
    }
    keep[r] = soften(scores[r], tile.count, out.top + first + r, out.sum + first + r);
    if (cache.value_scales)
      for (int i = 0; i < tile.count; ++i) scores[r][i] *= cache.value_scales[tile.slot + i];
  }
  mix_values<R>(scores, keep, values, tile.count, dim, out.mix + int64_t(first) * dim);
}

template <class K, class V>
void attend_as(const Cache& cache, const Queries& q, int64_t begin, int64_t end,
               const Partial& out) {
  for (int64_t at = begin; at < end;) {
    Tile tile{at, at % cache.slots, kTile};
    if (tile.count > end - at) tile.count = int(end - at);
    if (tile.count > cache.slots - tile.slot) tile.count = int(cache.slots - tile.slot);
    int r = 0;
    for (; r + kRows <= q.count; r += kRows) fold<kRows, K, V>(cache, q, r, tile, out);
    if (kRows > 4 && r + 4 <= q.count) fold<4, K, V>(cache, q, r, tile, out), r += 4;
    if (r + 2 <= q.count) fold<2, K, V>(cache, q, r, tile, out), r += 2;
    if (r < q.count) fold<1, K, V>(cache, q, r, tile, out);
    at += tile.count;
  }
}

void attend(const Cache& cache, const Queries& q, int64_t begin, int64_t end, const Partial& out) {
  switch (cache.storage) {
    case Storage::f32: return attend_as<float, float>(cache, q, begin, end, out);
    case Storage::f16: return attend_as<uint16_t, uint16_t>(cache, q, begin, end, out);
    case Storage::int8:
      return cache.key_zero ? attend_as<uint8_t, int8_t>(cache, q, begin, end, out)
                            : attend_as<int8_t, int8_t>(cache, q, begin, end, out);
  }
}

void norm_rope(const float* x, const float* weight, const float* cos, const float* sin, int dim,
               float eps, float scale, float* out) {
  const float root = 1.0f / sqrtf(dot(x, x, dim) / float(dim) + eps);
  for (int d = 0; d < dim; ++d) out[d] = x[d] * root * (weight ? weight[d] : 1.0f);
  if (cos) {
    const int half = dim / 2;
    for (int d = 0; d < half; ++d) {
      const float a = out[d], b = out[d + half];
      out[d] = (a * cos[d] - b * sin[d]) * scale;
      out[d + half] = (b * cos[d] + a * sin[d]) * scale;
    }
  } else if (scale != 1.0f) {
    for (int d = 0; d < dim; ++d) out[d] *= scale;
  }
}

void store(const float* x, int dim, Storage storage, int zero, void* row, float* row_scale) {
  switch (storage) {
    case Storage::f32: memcpy(row, x, sizeof(float) * size_t(dim)); return;
    case Storage::f16:
      for (int d = 0; d < dim; ++d) static_cast<uint16_t*>(row)[d] = float_to_half(x[d]);
      return;
    case Storage::int8: {
      float top = 1e-20f;
      for (int d = 0; d < dim; ++d) top = fabsf(x[d]) > top ? fabsf(x[d]) : top;
      const float scale = top * float(1.0 / 127);
      for (int d = 0; d < dim; ++d)
        static_cast<uint8_t*>(row)[d] = uint8_t(int(rintf(x[d] / scale)) + zero);
      *row_scale = scale;
      return;
    }
  }
}

}  // namespace

#define EDGE_KV_JOIN(a, b) a##b
#define EDGE_KV_NAMED(isa) EDGE_KV_JOIN(kernels_, isa)
extern const Kernels EDGE_KV_NAMED(EDGE_KV_ISA);
const Kernels EDGE_KV_NAMED(EDGE_KV_ISA) = {EDGE_KV_ISA_NAME, attend, norm_rope, store, dot};

}  // namespace edge_kv
