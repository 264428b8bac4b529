// The kernels of fused.h for one instruction set; part of kernels.cpp.
#pragma once

#include "simd.h"

namespace edge_kv {
namespace {

// 1 / (1 + exp(-x)), by exponentials of what is not positive; at least exp(-87).
inline Vec sigmoid(Vec x) {
  const Vec zero = splat(0.0f), one = splat(1.0f), negative = sub(zero, x);
  const Vec below = sub(zero, larger(negative, zero)), size = larger(x, negative);
  return divide(exponential(below), add(one, exponential(sub(zero, size))));
}

// f over vectors of `count` values; the last of them in a vector of their own.
template <class F>
inline void each_vector(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) f(i, kWidth);
  if (i < count) f(i, int(count - i));
}

inline Vec load_some(const float* p, int n) {
  if (n == kWidth) return load(p);
  float lanes[kWidth] = {};
  memcpy(lanes, p, sizeof(float) * size_t(n));
  return load(lanes);
}

inline void save_some(float* p, Vec x, int n) {
  if (n == kWidth) return save(p, x);
  float lanes[kWidth];
  save(lanes, x);
  memcpy(p, lanes, sizeof(float) * size_t(n));
}

// tanh(y) = 2 sigmoid(2 y) - 1; what is not finite stays so, which `exponential` would hide.
void softcap(const float* x, int64_t count, float cap, float* out) {
  const Vec inner = splat(2.0f / cap), outer = splat(2.0f * cap), whole = splat(cap);
  each_vector(count, [&](int64_t i, int n) {
    const Vec v = load_some(x + i, n), zero = sub(v, v);
    save_some(out + i, multiply_add(outer, sigmoid(mul(v, inner)), sub(zero, whole)), n);
  });
}

void to_steps(const float* x, int64_t count, float step, float* out) {
  const Vec by = splat(step);
  each_vector(count, [&](int64_t i, int n) {
    save_some(out + i, mul(whole_steps(load_some(x + i, n), by), by), n);
  });
}

// Products of T tokens with two rows, each read once.
template <int T>
inline void float_pair(const float* x, const float* row, int64_t n_in, int rows, float* out,
                       int64_t stride) {
  const float* other = rows > 1 ? row + n_in : row;
  Vec first[T], second[T];
  for (int t = 0; t < T; ++t) first[t] = second[t] = splat(0.0f);
  int64_t d = 0;
  for (; d + kWidth <= n_in; d += kWidth) {
    const Vec a = load(row + d), b = load(other + d);
    for (int t = 0; t < T; ++t) {
      const Vec v = load(x + t * n_in + d);
      first[t] = multiply_add(v, a, first[t]);
      second[t] = multiply_add(v, b, second[t]);
    }
  }
  for (int t = 0; t < T; ++t) {
    float a = total(first[t]), b = total(second[t]);
    for (int64_t i = d; i < n_in; ++i) {
      a += x[t * n_in + i] * row[i];
      b += x[t * n_in + i] * other[i];
    }
    out[t * stride] = a;
    if (rows > 1) out[t * stride + 1] = b;
  }
}

// Rows [count, n_in] times every token; `out` is the first column of theirs, its rows are `stride`
// apart.
void float_rows(const float* x, int64_t tokens, const float* rows, int64_t count, int64_t n_in,
                float* out, int64_t stride) {
  for (int64_t row = 0; row < count; row += 2) {
    const int pair = count - row > 1 ? 2 : 1;
    const float* at = rows + row * n_in;
    int64_t t = 0;
    for (; t + kRows <= tokens; t += kRows)
      float_pair<kRows>(x + t * n_in, at, n_in, pair, out + t * stride + row, stride);
    for (; t < tokens; ++t)
      float_pair<1>(x + t * n_in, at, n_in, pair, out + t * stride + row, stride);
  }
}

}  // namespace
}  // namespace edge_kv
