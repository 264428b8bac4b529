// The kernels of kernels.h for the instruction set this file is compiled for.
//
// Only functions of internal linkage and C headers are used: an inline function of the standard
// library compiled here could replace the portable copy of it in another object file.
#include "kernels.h"

#include "dense_kernels.h"
#include "dense_tiles.h"
#include "dots.h"
#include "simd.h"

namespace edge_kv {
namespace {

constexpr int kTile = 128;  // keys whose scores are held at a time; their rows fit the L2 cache

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

// Whether any of the query rows [first, first + rows) sees a key of the tile.
inline bool sees(const Queries& q, int first, int rows, const Tile& tile) {
  const int64_t oldest = q.position + first / q.group;
  const int64_t newest = q.position + (first + rows - 1) / q.group;
  return tile.position <= newest &&
         (!q.window || tile.position + tile.count - 1 > oldest - q.window);
}

// Turn the products of R query rows with a tile's keys into the weights of its values; `steps` is
// what a unit of each row's products stands for, `keep` gets the factors for what was summed
// before.
template <int R>
inline void weigh(const Cache& cache, const Queries& q, int first, const Tile& tile,
                  const float* steps, float (*scores)[kTile], float* keep, const Partial& out) {
  const int64_t oldest = q.position + first / q.group;
  const int64_t newest = q.position + (first + R - 1) / q.group;
  const bool edge = tile.position + tile.count - 1 > oldest ||
                    (q.window && tile.position <= newest - q.window);
  for (int r = 0; r < R; ++r) {
    if (cache.key_scales)
      for (int i = 0; i < tile.count; ++i)
        scores[r][i] *= steps[r] * cache.key_scales[tile.slot + i];
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
}

// The values are next; later query rows find them in the cache.
inline void prefetch(const void* rows, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64)
    __builtin_prefetch(static_cast<const char*>(rows) + b, 0, 2);
}

template <int N>
struct Rows {
  static constexpr int count = N;
};

// Call fold(Rows<N>, first, tile) for the tiles of [begin, end) and, in each, for the query rows
// [0, count) by MAX at a time.
template <int MAX, class F>
inline void walk(const Cache& cache, int64_t begin, int64_t end, int count, F fold) {
  for (int64_t at = begin; at < end;) {
    Tile tile{at, at % cache.slots, kTile};
    if (tile.count > end - at) tile.count = int(end - at);
    if (tile.count > cache.slots - tile.slot) tile.count = int(cache.slots - tile.slot);
    int r = 0;
    for (; r + MAX <= count; r += MAX) fold(Rows<MAX>(), r, tile);
    if (MAX > 4 && r + 4 <= count) fold(Rows<4>(), r, tile), r += 4;
    if (r + 2 <= count) fold(Rows<2>(), r, tile), r += 2;
    if (r < count) fold(Rows<1>(), r, tile);
    at += tile.count;
  }
}

// Attention in floats: K and V are what a key and a value are stored as.
template <class K, class V>
void attend_as(const Cache& cache, const Queries& q, int64_t begin, int64_t end,
               const Partial& out) {
  const int dim = cache.dim;
  float steps[kRows];
  for (float& step : steps) step = 1.0f;
  walk<kRows>(cache, begin, end, q.count, [&](auto block, int first, const Tile& tile) {
    constexpr int R = decltype(block)::count;
    if (!sees(q, first, R, tile)) return;
    alignas(64) float scores[R][kTile];
    float keep[R];
    const float* rows = q.rows + int64_t(first) * dim;
    const K* keys = static_cast<const K*>(cache.keys) + tile.slot * dim;
    const V* values = static_cast<const V*>(cache.values) + tile.slot * dim;
    int j = 0;
    for (; j + 2 <= tile.count; j += 2) {
      if (first == 0) prefetch(values + int64_t(j) * dim, 2 * dim * int64_t(sizeof(V)));
      dot_pair<R>(rows, dim, keys + int64_t(j) * dim, scores, j);
    }
    if (j < tile.count) dot_single<R>(rows, dim, keys + int64_t(j) * dim, scores, j);
    weigh<R>(cache, q, first, tile, steps, scores, keep, out);
    mix_values<R>(scores, keep, values, tile.count, dim, out.mix + int64_t(first) * dim);
  });
}

#if defined(EDGE_KV_DOTS)

constexpr int kQueryRows = 64;  // query rows held as digits at a time, and their values
constexpr int kQueryValues = 64 * 512;

// Round n numbers, a multiple of kWidth, to 16 bits of the largest of them: `range` steps. Returns
// the step.
inline float to_digits(const float* x, int n, float range, Digit* to, int stride) {
  Vec top = splat(1e-30f);
  for (int i = 0; i < n; i += kWidth) {
    const Vec v = load(x + i);
    top = larger(top, larger(v, sub(splat(0.0f), v)));
  }
  const float step = largest(top) / range;
  const Vec per_step = splat(1.0f / step);
  for (int i = 0; i < n; i += kWidth) save_digits(to + i, stride, mul(load(x + i), per_step));
  return step;
}

// scores[r][j and j + 1] = q[r] . two keys, in units of the product of their steps.
template <int R, class K>
inline void digit_dots(const Digit* q, int dim, const K* one, const K* two, float (*scores)[kTile],
                       int j) {
  Dots sums[R][2][kDigits];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < kDigits; ++g) sums[r][0][g] = sums[r][1][g] = no_dots();
  for (int d = 0; d < dim; d += kSpan) {
    const Digits a = widen(one + d), b = widen(two + d);
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < kDigits; ++g) {
        const Digits x = load_digits(q + (r * kDigits + g) * dim + d);
        sums[r][0][g] = dot_add(sums[r][0][g], x, a);
        sums[r][1][g] = dot_add(sums[r][1][g], x, b);
      }
  }
  for (int r = 0; r < R; r += 2) {
    const int next = r + 1 < R ? r + 1 : r;
    save_totals(sums[r], sums[next], scores[r] + j, scores[next] + j);
  }
}

// mix[r] = keep[r] * mix[r] + steps[r] * sum_j weights[r][j] * values[j]; unless `next` is null, as
// many bytes from there are fetched on the way.
template <int R>
inline void digit_mix(const Digit (*weights)[kDigits][kTile], const float* steps, const float* keep,
                      const int8_t* values, int n, int dim, float* mix, const char* next) {
  for (int d = 0; d < dim; d += 2 * kWidth) {
    Dots low[R][kDigits], high[R][kDigits];
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < kDigits; ++g) low[r][g] = high[r][g] = no_dots();
    for (int j = 0; j < n; j += kGroup) {
      const int8_t* rows[kGroup];
      for (int i = 0; i < kGroup; ++i) {
        const int row = j + i < n ? j + i : n - 1;  // beyond the last row the weights are zero
        rows[i] = values + int64_t(row) * dim + d;
      }
      if (next) __builtin_prefetch(next, 0, 2), next += kGroup * 2 * kWidth;
      Digits v[2];
      columns(rows, v);
      for (int r = 0; r < R; ++r)
        for (int g = 0; g < kDigits; ++g) {
          const Digits w = splat_group(weights[r][g] + j);
          low[r][g] = dot_add(low[r][g], w, v[0]);
          high[r][g] = dot_add(high[r][g], w, v[1]);
        }
    }
    for (int r = 0; r < R; ++r) {
      Vec a = as_floats(low[r]), b = as_floats(high[r]);
      in_order(a, b);
      float* to = mix + r * dim + d;
      const Vec step = splat(steps[r]), k = splat(keep[r]);
      save(to, multiply_add(a, step, mul(load(to), k)));
      save(to + kWidth, multiply_add(b, step, mul(load(to + kWidth), k)));
    }
  }
}

// Attention over int8 rows in exact integer products: queries and weights are rounded to 16 bits,
// relative to the largest of a query row and of a row's weights within a tile.
template <class K>
void attend_digits(const Cache& cache, const Queries& q, int64_t begin, int64_t end,
                   const Partial& out) {
  const int dim = cache.dim;
  const float fits = 16777216.0f / float(dim);  // range * 128 * dim stays in an int32
  const float range = fits < kLargest ? fits : kLargest;
  alignas(64) Digit digits[kDigits * kQueryValues];
  float query_steps[kQueryRows];
  const int most = kQueryValues / dim < kQueryRows ? kQueryValues / dim : kQueryRows;
  for (int from = 0; from < q.count; from += most) {
    const int count = q.count - from < most ? q.count - from : most;
    for (int r = 0; r < count; ++r)
      query_steps[r] = to_digits(q.rows + int64_t(from + r) * dim, dim, range,
                                 digits + r * kDigits * dim, dim);
    walk<kDotRows>(cache, begin, end, count, [&](auto block, int at, const Tile& tile) {
      constexpr int R = decltype(block)::count;
      const int first = from + at, n = tile.count;
      if (!sees(q, first, R, tile)) return;
      alignas(64) float scores[R][kTile];
      alignas(64) Digit weights[R][kDigits][kTile];
      float steps[R], keep[R];
      const Digit* rows = digits + at * kDigits * dim;
      const K* keys = static_cast<const K*>(cache.keys) + tile.slot * dim;
      const int8_t* values = static_cast<const int8_t*>(cache.values) + tile.slot * dim;
      for (int j = 0; j < n; j += 2) {
        if (first == 0) prefetch(values + int64_t(j) * dim, (j + 1 < n ? 2 : 1) * dim);
        const K* key = keys + int64_t(j) * dim;
        digit_dots<R>(rows, dim, key, j + 1 < n ? key + dim : key, scores, j);
      }
      weigh<R>(cache, q, first, tile, query_steps + at, scores, keep, out);
      const int padded = (n + kWidth - 1) / kWidth * kWidth;
      for (int r = 0; r < R; ++r) {
        for (int i = n; i < padded; ++i) scores[r][i] = 0.0f;
        steps[r] = to_digits(scores[r], padded, kLargest, weights[r][0], kTile);
      }
      const bool more = first == 0 && tile.slot + 2 * n <= cache.slots;
      digit_mix<R>(weights, steps, keep, values, n, dim, out.mix + int64_t(first) * dim,
                   more ? reinterpret_cast<const char*>(keys + int64_t(n) * dim) : nullptr);
    });
  }
}

#endif

template <class K>
void attend_int8(const Cache& cache, const Queries& q, int64_t begin, int64_t end,
                 const Partial& out) {
#if defined(EDGE_KV_DOTS)
  if (cache.dim % kSpan == 0 && cache.dim <= kQueryValues)
    return attend_digits<K>(cache, q, begin, end, out);
#endif
  attend_as<K, int8_t>(cache, q, begin, end, out);
}

void attend(const Cache& cache, const Queries& q, int64_t begin, int64_t end, const Partial& out) {
  switch (cache.storage) {
    case Storage::f32: return attend_as<float, float>(cache, q, begin, end, out);
    case Storage::f16: return attend_as<uint16_t, uint16_t>(cache, q, begin, end, out);
    case Storage::int8:
      return cache.key_zero ? attend_int8<uint8_t>(cache, q, begin, end, out)
                            : attend_int8<int8_t>(cache, q, begin, end, out);
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
    case Storage::f16: {
      uint16_t* to = static_cast<uint16_t*>(row);
      int d = 0;
      for (; d + kWidth <= dim; d += kWidth) save(to + d, load(x + d));
      for (; d < dim; ++d) to[d] = float_to_half_bits(x[d]);
      return;
    }
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
#define EDGE_KV_QUOTED(isa) #isa
#define EDGE_KV_TEXT(isa) EDGE_KV_QUOTED(isa)
extern const Kernels EDGE_KV_NAMED(EDGE_KV_ISA);
const Kernels EDGE_KV_NAMED(EDGE_KV_ISA) = {
    EDGE_KV_TEXT(EDGE_KV_ISA), attend, norm_rope, store, dot,
    dense_fits, dense_bytes, dense_round, dense_rows,
    kTileRows, tiles_fit, tile_token_bytes, tile_round, tile_bytes, tile_dense,
};

}  // namespace edge_kv
