// The kernels of kernels.h for the instruction set this file is compiled for.
//
// Only functions of internal linkage and C headers are used: an inline function of the standard
// library compiled here could replace the portable copy of it in another object file.
#include "kernels.h"

#include "dots.h"
#include "fused_kernels.h"
#include "weight_kernels.h"
#include "simd.h"

namespace edge_kv {
namespace {

constexpr int kTile = 128;  // most keys whose scores are held at a time
constexpr int kLeastTile = 32;
constexpr int kTileValues = 128 << 10;  // of their rows: two tiles of keys and values fit the L2 cache

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
inline void dot_pair(const float* q, int dim, const E* key, const E* next, float (*scores)[kTile],
                     int j) {
  Vec first[R], second[R];
  for (int r = 0; r < R; ++r) first[r] = second[r] = splat(0.0f);
  int d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    const Vec a = load(key + d), b = load(next + d);
    for (int r = 0; r < R; ++r) {
      const Vec x = load(q + r * dim + d);
      first[r] = multiply_add(x, a, first[r]);
      second[r] = multiply_add(x, b, second[r]);
    }
  }
  for (int r = 0; r < R; r += 2) {
    const int after = r + 1 < R ? r + 1 : r;
    save_totals(first[r], second[r], first[after], second[after], scores[r] + j, scores[after] + j);
  }
  for (; d < dim; ++d)
    for (int r = 0; r < R; ++r) {
      scores[r][j] += q[r * dim + d] * value_of(key[d]);
      scores[r][j + 1] += q[r * dim + d] * value_of(next[d]);
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

// Scores become weights: exponentials, times the scales of their values if there are any. A row of
// scores is whole vectors; `peak` is the largest of them.
struct Softened {
  float keep;     // factor for what was summed before
  float largest;  // weight
};

inline Softened soften(float* scores, int n, float peak, const float* scales, float* top,
                       float* sum) {
  if (*top > peak) peak = *top;
  const Vec shift = splat(peak);
  Vec mass = splat(0.0f), high = mass;
  for (int j = 0; j < n; j += kWidth) {
    Vec w = exponential(sub(load(scores + j), shift));
    mass = add(mass, w);
    if (scales) w = mul(w, load(scales + j));
    high = larger(high, w);
    save(scores + j, w);
  }
  const float keep = *top == peak ? 1.0f : expf(*top - peak);
  *sum = *sum * keep + total(mass);
  *top = peak;
  return {keep, largest(high)};
}

// mix[r] = keep * mix[r] + sum_j weights[r][j] * values[j]; values lie `stride` apart.
template <int R, class E>
inline void mix_values(const float (*weights)[kTile], const Softened* soft, const E* values,
                       int64_t stride, int n, int dim, float* mix) {
  int d = 0;
  for (; d + 2 * kWidth <= dim; d += 2 * kWidth) {
    Vec low[R], high[R];
    for (int r = 0; r < R; ++r) {
      const Vec k = splat(soft[r].keep);
      low[r] = mul(load(mix + r * dim + d), k);
      high[r] = mul(load(mix + r * dim + d + kWidth), k);
    }
    const E* v = values + d;
    for (int j = 0; j < n; ++j, v += stride) {
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
      float x = mix[r * dim + d] * soft[r].keep;
      for (int j = 0; j < n; ++j) x += weights[r][j] * value_of(values[j * stride + d]);
      mix[r * dim + d] = x;
    }
}

struct Tile {
  int64_t first;  // row
  int64_t slot;
  int count;
};

// Whether any of the query rows [first, first + rows) sees a key of the tile.
inline bool sees(const Queries& q, int first, int rows, const Tile& tile) {
  return tile.first <= q.newest(first + rows - 1) &&
         (!q.window || tile.first + tile.count - 1 > q.newest(first) - q.window);
}

// Up to whole vectors.
constexpr int rounded_up(int n) { return (n + kWidth - 1) / kWidth * kWidth; }

// Scales of a tile's rows side by side, zero beyond them.
struct TileScales {
  alignas(64) float keys[kTile], values[kTile];

  void read(const Cache& cache, const Tile& tile) {
    if (!cache.key_scales) return;
    for (int i = 0; i < rounded_up(tile.count); ++i) {
      const int64_t at = (tile.slot + i) * cache.scale_stride;
      keys[i] = i < tile.count ? cache.key_scales[at] : 0.0f;
      values[i] = i < tile.count ? cache.value_scales[at] : 0.0f;
    }
  }
};

inline float peak_of(const float* scores, int n) {
  Vec high = splat(kMasked);
  for (int j = 0; j < n; j += kWidth) high = larger(high, load(scores + j));
  return largest(high);
}

// Products of a query row with a tile's keys, in units of `step`, become scores; what `sum` holds, if
// it is given, is added. Returns the largest.
inline float scale_scores(float* scores, const float* scales, float step, int n,
                          const float* sum = nullptr) {
  const Vec by = splat(step);
  Vec high = splat(kMasked);
  for (int j = 0; j < n; j += kWidth) {
    const Vec product = load(scores + j), scale = mul(load(scales + j), by);
    const Vec x = sum ? multiply_add(product, scale, load(sum + j)) : mul(product, scale);
    high = larger(high, x);
    save(scores + j, x);
  }
  return largest(high);
}

// Whether there are keys of the tile that not all of R query rows see, or vectors are not full.
template <int R>
inline bool at_edge(const Queries& q, int first, const Tile& tile) {
  return tile.count % kWidth || tile.first + tile.count - 1 > q.newest(first) ||
         (q.window && tile.first <= q.newest(first + R - 1) - q.window);
}

// What query row r does not see gets no weight.
inline void mask_scores(const Queries& q, int r, const Tile& tile, float* scores) {
  const int64_t newest = q.newest(r);
  for (int i = 0; i < rounded_up(tile.count); ++i) {
    const int64_t key = tile.first + i;
    if (i >= tile.count || key > newest || (q.window && key <= newest - q.window))
      scores[i] = kMasked;
  }
}

// Products of R query rows with a tile's keys become the weights of its values; `steps` is what a
// unit of each row's products stands for.
template <int R>
inline void weigh(const Queries& q, int first, const Tile& tile, const TileScales* scales,
                  const float* steps, float (*scores)[kTile], Softened* soft, const Partial& out) {
  const int n = rounded_up(tile.count);
  const bool edge = at_edge<R>(q, first, tile);
  for (int r = 0; r < R; ++r) {
    float peak = scales ? scale_scores(scores[r], scales->keys, steps[r], n) : 0.0f;
    if (edge) mask_scores(q, first + r, tile, scores[r]);
    if (edge || !scales) peak = peak_of(scores[r], n);
    soft[r] = soften(scores[r], n, peak, scales ? scales->values : nullptr, out.top + first + r,
                     out.sum + first + r);
  }
}

// The values are next; later query rows find them in the cache.
inline void prefetch(const void* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64)
    __builtin_prefetch(static_cast<const char*>(row) + b, 0, 2);
}

template <int N>
struct Rows {
  static constexpr int count = N;
};

// Rows of a tile: with all heads they are at most kTileValues values, and the next tile is fetched
// while one is at hand.
inline int tile_rows(const Cache& cache) {
  const int64_t fit = kTileValues / (int64_t(cache.dim) * cache.heads);
  return fit >= kTile ? kTile : fit <= kLeastTile ? kLeastTile : int(fit / kLeastTile * kLeastTile);
}

// For the tiles of [begin, end), in each for every head, call open(head, tile) and then
// fold(Rows<N>, head, first, tile) for its query rows [0, count) by MAX at a time: memory is read in
// one stream.
template <int MAX, class O, class F>
inline void walk(const Cache& cache, int64_t begin, int64_t end, int count, O open, F fold) {
  const int rows = tile_rows(cache);
  for (int64_t at = begin; at < end;) {
    Tile tile{at, at % cache.slots, rows};
    if (tile.count > end - at) tile.count = int(end - at);
    if (tile.count > cache.slots - tile.slot) tile.count = int(cache.slots - tile.slot);
    for (int head = 0; head < cache.heads; ++head) {
      open(head, tile);
      int r = 0;
      for (; r + MAX <= count; r += MAX) fold(Rows<MAX>(), head, r, tile);
      if (MAX > 4 && r + 4 <= count) fold(Rows<4>(), head, r, tile), r += 4;
      if (r + 2 <= count) fold(Rows<2>(), head, r, tile), r += 2;
      if (r < count) fold(Rows<1>(), head, r, tile);
    }
    at += tile.count;
  }
}

// One head of a cache, and of what is in progress for its queries.
inline Cache head_of(const Cache& cache, int head, int64_t element_bytes) {
  Cache one = cache;
  one.keys = static_cast<const char*>(cache.keys) + head * cache.dim * element_bytes;
  one.values = static_cast<const char*>(cache.values) + head * cache.dim * element_bytes;
  if (cache.key_scales) one.key_scales += head;
  if (cache.value_scales) one.value_scales += head;
  one.heads = 1;
  return one;
}

inline Partial head_of(const Partial& all, int head) {
  const int64_t at = head * all.next;
  return {all.top + at, all.sum + at, all.mix + at, 0};
}

// Attention in floats over rows that are stored as T.
template <class T>
void attend_as(const Cache& cache, const Queries& q, int64_t begin, int64_t end,
               const Partial& out) {
  const int dim = cache.dim;
  float ones[kRows];
  for (float& one : ones) one = 1.0f;
  TileScales scales;
  const auto open = [&](int head, const Tile& tile) {
    scales.read(head_of(cache, head, sizeof(T)), tile);
  };
  walk<kRows>(cache, begin, end, q.count, open, [&](auto block, int head, int first,
                                                    const Tile& tile) {
    constexpr int R = decltype(block)::count;
    if (!sees(q, first, R, tile)) return;
    const Cache one = head_of(cache, head, sizeof(T));
    const Partial partial = head_of(out, head);
    alignas(64) float scores[R][kTile];
    Softened soft[R];
    const float* rows = q.rows + head * q.next + int64_t(first) * dim;
    const int64_t stride = one.row_stride;
    const T* keys = static_cast<const T*>(one.keys) + tile.slot * stride;
    const T* values = static_cast<const T*>(one.values) + tile.slot * stride;
    int j = 0;
    for (; j + 2 <= tile.count; j += 2) {
      if (first == 0) {
        prefetch(values + j * stride, dim * int64_t(sizeof(T)));
        prefetch(values + (j + 1) * stride, dim * int64_t(sizeof(T)));
      }
      dot_pair<R>(rows, dim, keys + j * stride, keys + (j + 1) * stride, scores, j);
    }
    if (j < tile.count) dot_single<R>(rows, dim, keys + j * stride, scores, j);
    weigh<R>(q, first, tile, cache.key_scales ? &scales : nullptr, ones, scores, soft, partial);
    mix_values<R>(scores, soft, values, stride, tile.count, dim,
                  partial.mix + int64_t(first) * dim);
  });
}

#if defined(EDGE_KV_DOTS)

constexpr int kQueryRows = 512;  // query rows of all heads held as digits at a time, their values
constexpr int kQueryValues = 128 * 512;

// Query rows of a head that are held at a time.
inline int rows_held(const Cache& cache) {
  const int fit = kQueryValues / cache.dim / cache.heads, most = kQueryRows / cache.heads;
  return fit < most ? fit : most;
}

// The largest magnitude of n numbers, a multiple of kWidth.
inline float size_of(const float* x, int n) {
  Vec top = splat(0.0f);
  for (int i = 0; i < n; i += kWidth) {
    const Vec v = load(x + i);
    top = larger(top, larger(v, sub(splat(0.0f), v)));
  }
  return largest(top);
}

// Round n numbers of at most `size`, a multiple of kWidth, to 16 bits: `size` is `range` steps.
// Returns the step.
inline float to_digits(const float* x, int n, float size, float range, Digit* to, int stride) {
  const float step = (size > 1e-30f ? size : 1e-30f) / range;
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

// Rows that are read after the ones at hand, fetched little by little while some query rows, `share`
// of `whole`, meet those: each fetches its part, so that memory is never asked for all at once.
struct Ahead {
  const char* row;
  int64_t stride;
  int bytes;  // of a row
  int share, whole;
  int64_t left;  // bytes
  int column = 0;
  int64_t due = 0;

  // A step of the work, in which as many bytes of the rows at hand are met.
  void fetch(int met) {
    for (due += int64_t(met) * share; due >= 64 * whole && left > 0; due -= 64 * whole) {
      __builtin_prefetch(row + column, 0, 2);
      left -= 64;
      column += 64;
      if (column >= bytes) column -= bytes, row += stride;
    }
  }
};

// mix[r] = keep * mix[r] + steps[r] * sum_j weights[r][j] * values[j], values lying `stride`
// apart; as many rows are fetched `ahead` on the way.
template <int R>
inline void digit_mix(const Digit (*weights)[kDigits][kTile], const float* steps,
                      const Softened* soft, const int8_t* values, int64_t stride, int n, int dim,
                      float* mix, Ahead ahead) {
  for (int d = 0; d < dim; d += 2 * kWidth) {
    Dots low[R][kDigits], high[R][kDigits];
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < kDigits; ++g) low[r][g] = high[r][g] = no_dots();
    for (int j = 0; j < n; j += kGroup) {
      const int8_t* rows[kGroup];
      for (int i = 0; i < kGroup; ++i) {
        const int row = j + i < n ? j + i : n - 1;  // beyond the last row the weights are zero
        rows[i] = values + row * stride + d;
      }
      ahead.fetch(kGroup * 2 * kWidth);
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
      const Vec step = splat(steps[r]), k = splat(soft[r].keep);
      save(to, multiply_add(a, step, mul(load(to), k)));
      save(to + kWidth, multiply_add(b, step, mul(load(to + kWidth), k)));
    }
  }
}

// What query rows [at, at + share) of `whole` fetch of the rows of a head that follow a tile's.
inline Ahead after(const Cache& one, const Tile& tile, const void* rows, int at, int share,
                   int whole) {
  const int64_t first = int64_t(tile.count) * at / whole;
  const int64_t last = int64_t(tile.count) * (at + share) / whole;
  const bool more = tile.slot + 2 * tile.count <= one.slots;
  const char* const next = static_cast<const char*>(rows) + (tile.slot + tile.count) * one.row_stride;
  return {next + first * one.row_stride, one.row_stride,
          one.dim,                       share,
          whole,                         more ? (last - first) * one.dim : 0};
}

// Attention over int8 rows in exact integer products: queries and weights are rounded to 16 bits,
// relative to the largest of a query row and of a row's weights within a tile.
void attend_digits(const Cache& cache, const Queries& q, int64_t begin, int64_t end,
                   const Partial& out) {
  const int dim = cache.dim, most = rows_held(cache);
  const float fits = 16777216.0f / float(dim);  // range * 128 * dim stays in an int32
  const float range = fits < kLargest ? fits : kLargest;
  alignas(64) Digit digits[kDigits * kQueryValues];
  float query_steps[kQueryRows];
  for (int from = 0; from < q.count; from += most) {
    const int count = q.count - from < most ? q.count - from : most;
    for (int head = 0; head < cache.heads; ++head)
      for (int r = 0; r < count; ++r) {
        const int row = head * count + r;
        const float* const x = q.rows + head * q.next + int64_t(from + r) * dim;
        query_steps[row] =
            to_digits(x, dim, size_of(x, dim), range, digits + row * kDigits * dim, dim);
      }
    TileScales scales;
    const auto open = [&](int head, const Tile& tile) {
      scales.read(head_of(cache, head, 1), tile);
    };
    walk<kDotRows>(cache, begin, end, count, open, [&](auto block, int head, int at,
                                                       const Tile& tile) {
      constexpr int R = decltype(block)::count;
      const int first = from + at, n = tile.count, row = head * count + at;
      if (!sees(q, first, R, tile)) return;
      const Cache one = head_of(cache, head, 1);
      const Partial partial = head_of(out, head);
      alignas(64) float scores[R][kTile];
      alignas(64) Digit weights[R][kDigits][kTile];
      float steps[R];
      Softened soft[R];
      const int64_t stride = one.row_stride;
      const int8_t* keys = static_cast<const int8_t*>(one.keys) + tile.slot * stride;
      const int8_t* values = static_cast<const int8_t*>(one.values) + tile.slot * stride;
      const int ahead = at == 0 ? count : 0;  // the first rows fetch for the few others
      const Ahead keys_after = after(one, tile, one.keys, 0, ahead, count);
      for (int j = 0; j < n; j += 2) {
        const int next = j + 1 < n ? j + 1 : j;
        if (keys_after.left) {
          prefetch(keys_after.row + j * stride, dim);
          prefetch(keys_after.row + next * stride, dim);
        }
        digit_dots<R>(digits + row * kDigits * dim, dim, keys + j * stride, keys + next * stride,
                      scores, j);
      }
      weigh<R>(q, first, tile, &scales, query_steps + row, scores, soft, partial);
      for (int r = 0; r < R; ++r)
        steps[r] = to_digits(scores[r], rounded_up(n), soft[r].largest, kLargest, weights[r][0],
                             kTile);
      digit_mix<R>(weights, steps, soft, values, stride, n, dim,
                   partial.mix + int64_t(first) * dim, after(one, tile, one.values, 0, ahead, count));
    });
  }
}

// Where a tile's rows lie, the last one repeated up to a multiple of kWidth.
inline void find_rows(const void* rows, int64_t stride, const Tile& tile, const int8_t** to) {
  const int8_t* const first = static_cast<const int8_t*>(rows) + tile.slot * stride;
  for (int i = 0; i < rounded_up(tile.count); ++i)
    to[i] = first + (i < tile.count ? i : tile.count - 1) * stride;
}

#if defined(__AVX512VNNI__) || defined(EDGE_KV_TILES)

// Tiles of rows that are put in order once and then meet all queries: `attend_tiles`.
constexpr int kMostDim = 1024;     // values of a row
constexpr int kLine = 4 * kWidth;  // bytes of a vector
constexpr int kTileQueries = 8;    // query rows of a head; fewer are not worth the order

// Read a tile's scales and put its keys and its values in order, by calls of put(rows, how many).
template <class K, class V>
inline void order_tile(const Cache& one, const Tile& tile, TileScales& scales, K put_keys,
                       V put_values) {
  const int8_t* rows[kTile];
  const int n = rounded_up(tile.count);
  scales.read(one, tile);
  find_rows(one.keys, one.row_stride, tile, rows);
  put_keys(rows, n);
  find_rows(one.values, one.row_stride, tile, rows);
  put_values(rows, n);
}

#endif

#if defined(__AVX512VNNI__)
#include "byte_tiles.h"
#elif defined(EDGE_KV_TILES)

// Keys: a vector holds four bytes of each of kWidth keys, [keys / kWidth] [dim / 4].
inline void pack_keys(const int8_t* const* keys, int n, int dim, char* to) {
  for (int j = 0; j < n; j += kWidth)
    for (int d = 0; d < dim; d += kLine, to += kLine * kWidth) {
      Digits rows[kWidth];
      for (int i = 0; i < kWidth; ++i) rows[i] = load_packed(keys[j + i] + d);
      transpose_fours(rows);
      for (int i = 0; i < kWidth; ++i) save_packed(to + i * kLine, rows[i]);
    }
}

// Values: a vector holds kWidth of four rows, two vectors of the same rows adjoin,
// [dim / (2 * kWidth)] [rows / 4] [2].
inline void pack_values(const int8_t* const* values, int n, int dim, char* to) {
  for (int j = 0; j < n; j += 4)
    for (int d = 0; d < dim; d += kLine) {
      Digits rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = load_packed(values[j + i] + d);
      interleave(rows);
      for (int i = 0; i < 4; ++i) {
        const int pair = d / (2 * kWidth) + i / 2;
        save_packed(to + (int64_t(pair) * n / 2 + j / 2 + i % 2) * kLine, rows[i]);
      }
    }
}

// Sums of products of two vectors of packed bytes with the digits of R rows, `stride` apart, that
// come in fours: 0 2 1 3.
template <int R>
inline void add_fours(Dots (&sums)[R][2][1], const char* bytes, const char* next, const Digit* digits,
                      int stride) {
  const Digits a = load_packed(bytes), b = load_packed(next);
  const Digits a_even = evens(a), a_odd = odds(a);
  const Digits b_even = evens(b), b_odd = odds(b);
  for (int r = 0; r < R; ++r) {
    const Digits x = splat_group(digits + r * stride), y = splat_group(digits + r * stride + 2);
    sums[r][0][0] = dot_add(dot_add(sums[r][0][0], x, a_even), y, a_odd);
    sums[r][1][0] = dot_add(dot_add(sums[r][1][0], x, b_even), y, b_odd);
  }
}

template <int R>
inline void clear(Dots (&sums)[R][2][1]) {
  for (int r = 0; r < R; ++r) sums[r][0][0] = sums[r][1][0] = no_dots();
}

// scores[r][j] = q[r] . key j of a packed tile, in units of the product of their steps.
template <int R>
inline void tile_scores(const Digit* q, int dim, const char* keys, int n, float (*scores)[kTile],
                        Ahead ahead) {
  for (int j = 0; j < n; j += 2 * kWidth, keys += 2 * kWidth * dim) {
    Dots sums[R][2][1];
    clear(sums);
    for (int d = 0; d < dim; d += 4) {
      ahead.fetch(2 * kLine);
      add_fours(sums, keys + d * kWidth, keys + (dim + d) * kWidth, q + d, dim);
    }
    for (int r = 0; r < R; ++r) {
      save(scores[r] + j, as_floats(sums[r][0]));
      save(scores[r] + j + kWidth, as_floats(sums[r][1]));
    }
  }
}

// mix[r] = keep * mix[r] + steps[r] * sum_j weights[r][j] * value j of a packed tile.
template <int R>
inline void tile_mix(const Digit (*weights)[kDigits][kTile], const float* steps,
                     const Softened* soft, const char* values, int n, int dim, float* mix,
                     Ahead ahead) {
  for (int d = 0; d < dim; d += 2 * kWidth) {
    Dots sums[R][2][1];
    clear(sums);
    for (int j = 0; j < n; j += 4, values += 2 * kLine) {
      ahead.fetch(2 * kLine);
      add_fours(sums, values, values + kLine, weights[0][0] + j, kTile);
    }
    for (int r = 0; r < R; ++r) {
      float* to = mix + r * dim + d;
      const Vec step = splat(steps[r]), k = splat(soft[r].keep);
      save(to, multiply_add(as_floats(sums[r][0]), step, mul(load(to), k)));
      save(to + kWidth, multiply_add(as_floats(sums[r][1]), step, mul(load(to + kWidth), k)));
    }
  }
}

// Numbers in fours, 0 2 1 3.
inline void put_evens_first(Digit* digits, int n) {
  for (int i = 0; i < n; i += kSpan)
    save_packed(digits + i, evens_first(load_packed(digits + i)));
}

// attend_digits over tiles that are put in order once and then meet all queries: a row is read once
// however many they are.
void attend_tiles(const Cache& cache, const Queries& q, int64_t begin, int64_t end,
                  const Partial& out) {
  const int dim = cache.dim, most = rows_held(cache);
  const float fits = 16777216.0f / float(dim);  // range * 128 * dim stays in an int32
  const float range = fits < kLargest ? fits : kLargest;
  alignas(64) Digit digits[kQueryValues];
  alignas(64) char key_tile[kTile * kMostDim], value_tile[kTile * kMostDim];
  float query_steps[kQueryRows];
  for (int from = 0; from < q.count; from += most) {
    const int count = q.count - from < most ? q.count - from : most;
    for (int head = 0; head < cache.heads; ++head)
      for (int r = 0; r < count; ++r) {
        const int row = head * count + r;
        const float* const x = q.rows + head * q.next + int64_t(from + r) * dim;
        query_steps[row] = to_digits(x, dim, size_of(x, dim), range, digits + row * dim, dim);
        put_evens_first(digits + row * dim, dim);
      }
    TileScales scales;
    const auto open = [&](int head, const Tile& tile) {
      order_tile(
          head_of(cache, head, 1), tile, scales,
          [&](const int8_t* const* rows, int n) { pack_keys(rows, n, dim, key_tile); },
          [&](const int8_t* const* rows, int n) { pack_values(rows, n, dim, value_tile); });
    };
    walk<kDotRows>(cache, begin, end, count, open, [&](auto block, int head, int at,
                                                       const Tile& tile) {
      constexpr int R = decltype(block)::count;
      const int first = from + at, n = rounded_up(tile.count), row = head * count + at;
      if (!sees(q, first, R, tile)) return;
      const Cache one = head_of(cache, head, 1);
      const Partial partial = head_of(out, head);
      alignas(64) float scores[R][kTile];
      alignas(64) Digit weights[R][kDigits][kTile];
      float steps[R];
      Softened soft[R];
      tile_scores<R>(digits + row * dim, dim, key_tile, n, scores,
                     after(one, tile, one.keys, at, R, count));
      weigh<R>(q, first, tile, &scales, query_steps + row, scores, soft, partial);
      const int padded = (n + kSpan - 1) / kSpan * kSpan;
      for (int r = 0; r < R; ++r) {
        for (int i = n; i < padded; ++i) scores[r][i] = 0.0f;
        steps[r] = to_digits(scores[r], padded, soft[r].largest, kLargest, weights[r][0], kTile);
        put_evens_first(weights[r][0], padded);
      }
      tile_mix<R>(weights, steps, soft, value_tile, n, dim, partial.mix + int64_t(first) * dim,
                  after(one, tile, one.values, at, R, count));
    });
  }
}

#endif

#endif

void attend_int8(const Cache& cache, const Queries& q, int64_t begin, int64_t end,
                 const Partial& out) {
#if defined(EDGE_KV_DOTS)
  if (cache.heads > 1 && (kQueryRows / cache.heads < kDotRows ||
                          kQueryValues / cache.dim / cache.heads < kDotRows)) {  // many wide heads
    for (int head = 0; head < cache.heads; ++head) {
      Queries mine = q;
      mine.rows += head * q.next;
      attend_int8(head_of(cache, head, 1), mine, begin, end, head_of(out, head));
    }
    return;
  }
#endif
#if defined(__AVX512VNNI__)
  if (cache.dim % kLine == 0 && cache.dim <= kMostDim) {
    if (cache.dim >= kWideRow && q.count >= kDigitQueries && q.count <= kFewQueries)
      return attend_bytes<RowsInPlace>(cache, q, begin, end, out);
    if (q.count >= kTileQueries) return attend_bytes<OrderedTiles>(cache, q, begin, end, out);
  }
#elif defined(EDGE_KV_TILES)
  if (cache.dim % kLine == 0 && cache.dim <= kMostDim && q.count >= kTileQueries)
    return attend_tiles(cache, q, begin, end, out);
#endif
#if defined(EDGE_KV_DOTS)
  if (cache.dim % kSpan == 0 && cache.dim <= kQueryValues / kDotRows)
    return attend_digits(cache, q, begin, end, out);
#endif
  attend_as<int8_t>(cache, q, begin, end, out);
}

void attend(const Cache& cache, const Queries& q, int64_t begin, int64_t end, const Partial& out) {
  switch (cache.storage) {
    case Storage::f32: return attend_as<float>(cache, q, begin, end, out);
    case Storage::f16: return attend_as<uint16_t>(cache, q, begin, end, out);
    case Storage::int8: return attend_int8(cache, q, begin, end, out);
  }
}

void norm_rope(const float* x, const float* weight, const float* cos, const float* sin, int angles,
               Rotation rotation, int dim, float eps, float scale, float* out) {
  const float root = eps < 0 ? scale : scale / sqrtf(dot(x, x, dim) / float(dim) + eps);
  if (weight) {
    for (int d = 0; d < dim; ++d) out[d] = x[d] * root * weight[d];
  } else {
    for (int d = 0; d < dim; ++d) out[d] = x[d] * root;
  }
  if (rotation == Rotation::halves) {
    float* const second = out + angles;
    for (int i = 0; i < angles; ++i) {
      const float a = out[i], b = second[i];
      out[i] = a * cos[i] - b * sin[i];
      second[i] = b * cos[i] + a * sin[i];
    }
  } else {
    float* const last = out + dim - 2 * angles;
    for (int i = 0; i < angles; ++i) {
      const float a = last[2 * i], b = last[2 * i + 1];
      last[2 * i] = a * cos[i] - b * sin[i];
      last[2 * i + 1] = b * cos[i] + a * sin[i];
    }
  }
}

// relu_scores of rows stored as E.
template <class E>
void relu_scores_as(const Cache& cache, const float* q, int rows, const float* weights,
                    int64_t begin, int64_t end, float* scores) {
  const int dim = cache.dim;
  for (int64_t i = begin; i < end; ++i) scores[i - begin] = 0.0f;
  const auto open = [](int, const Tile&) {};
  walk<kRows>(cache, begin, end, rows, open, [&](auto block, int, int first, const Tile& tile) {
    constexpr int R = decltype(block)::count;
    alignas(64) float dots[R][kTile];
    const float* mine = q + int64_t(first) * dim;
    const E* keys = static_cast<const E*>(cache.keys) + tile.slot * cache.row_stride;
    int j = 0;
    for (; j + 2 <= tile.count; j += 2)
      dot_pair<R>(mine, dim, keys + j * cache.row_stride, keys + (j + 1) * cache.row_stride, dots,
                  j);
    if (j < tile.count) dot_single<R>(mine, dim, keys + j * cache.row_stride, dots, j);
    float* to = scores + (tile.first - begin);
    for (j = 0; j < tile.count; ++j) {
      float sum = 0.0f;
      for (int r = 0; r < R; ++r)
        sum += dots[r][j] > 0.0f ? weights[first + r] * dots[r][j] : 0.0f;
      // A scale is positive: it goes through the maximum.
      to[j] += cache.key_scales ? sum * cache.key_scales[(tile.slot + j) * cache.scale_stride] : sum;
    }
  });
}

void relu_scores(const Cache& cache, const float* q, int rows, const float* weights, int64_t begin,
                 int64_t end, float* scores) {
  const auto run = cache.storage == Storage::f32   ? relu_scores_as<float>
                   : cache.storage == Storage::f16 ? relu_scores_as<uint16_t>
                                                   : relu_scores_as<int8_t>;
  run(cache, q, rows, weights, begin, end, scores);
}

// Both activations are x times the logistic function of z: of x itself, or of the argument of tanh
// doubled.
void gated(const float* gate, const float* up, int64_t n, Activation activation, float limit,
           float* out) {
  constexpr int kPart = 64;
  alignas(64) float x[kPart], y[kPart], z[kPart], e[kPart];
  const float bound = limit > 0 ? limit : 3.4e38f;
  for (int64_t from = 0; from < n; from += kPart) {
    const int count = int(n - from < kPart ? n - from : kPart);
    for (int i = 0; i < kPart; ++i) {
      const float a = i < count ? gate[from + i] : 0.0f, b = i < count ? up[from + i] : 0.0f;
      x[i] = a < bound ? a : bound;
      y[i] = b < -bound ? -bound : b < bound ? b : bound;
      z[i] = activation == Activation::silu
                 ? x[i]
                 : 1.5957691216f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
      e[i] = -fabsf(z[i]);
    }
    for (int i = 0; i < kPart; i += kWidth) save(e + i, exponential(load(e + i)));
    for (int i = 0; i < count; ++i)
      out[from + i] = x[i] * y[i] * (z[i] < 0 ? e[i] : 1.0f) / (1.0f + e[i]);
  }
}

void store(const float* x, int dim, Storage storage, void* row, float* row_scale) {
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
      for (int d = 0; d < dim; ++d) {
        const float steps = rintf(x[d] / scale);  // no number where x is not finite
        static_cast<int8_t*>(row)[d] = int8_t(steps >= -127 && steps <= 127 ? int(steps) : 0);
      }
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
    EDGE_KV_TEXT(EDGE_KV_ISA), attend, norm_rope, store, dot, gated, relu_scores, softcap,
    to_steps, float_rows, round_row, multiply_groups,
};

}  // namespace edge_kv
