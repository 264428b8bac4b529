// The integer matrix-vector product for one instruction set; part of kernels.cpp.
//
// Weights lie as they were exported: nothing is packed again. A vector of bytes is taken apart in
// nibbles, 0 … 15, which every instruction set multiplies with signed bytes without overflow. Of
// 4-bit weights the low nibbles are the even values and the high nibbles the odd ones, so x is
// rounded into two runs of bytes; an 8-bit weight is 16 * high + low over the same x.
// dense_tiles.h does the same for many tokens, with the operations that are defined here.
#pragma once

#include "simd.h"

namespace edge_kv {
namespace {

constexpr int kBytes = 4 * kWidth;  // one int32 lane adds four products

#if defined(__AVX512BW__)

using Ints = __m512i;
inline Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline Ints low_nibbles(Ints b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
inline Ints high_nibbles(Ints b) { return low_nibbles(_mm512_srli_epi16(b, 4)); }
inline Ints add_products(Ints sum, Ints nibbles, Ints x) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sum, nibbles, x);
#else
  const Ints pairs = _mm512_maddubs_epi16(nibbles, x);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}
inline Ints times_16(Ints x) { return _mm512_slli_epi32(x, 4); }
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Vec to_float(Ints x) { return _mm512_cvtepi32_ps(x); }
// Lane i gets p[i >> shift]; lanes >> shift values are read.
inline Vec spread(const float* p, int shift) {
  const Ints lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __mmask16 few = __mmask16((1u << (kWidth >> shift)) - 1);
  const Ints from = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(shift));
  return _mm512_permutexvar_ps(from, _mm512_maskz_loadu_ps(few, p));
}

#elif defined(__AVX2__)

using Ints = __m256i;
inline Ints load_ints(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Ints low_nibbles(Ints b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
inline Ints high_nibbles(Ints b) { return low_nibbles(_mm256_srli_epi16(b, 4)); }
inline Ints add_products(Ints sum, Ints nibbles, Ints x) {
  const Ints pairs = _mm256_maddubs_epi16(nibbles, x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Ints times_16(Ints x) { return _mm256_slli_epi32(x, 4); }
inline Ints zero_ints() { return _mm256_setzero_si256(); }
inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Vec to_float(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Vec spread(const float* p, int shift) {
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = p[i >> shift];
  return load(lanes);
}

#elif defined(__ARM_NEON) && !defined(EDGE_KV_SCALAR)

using Ints = int32x4_t;
inline Ints load_ints(const void* p) { return vld1q_s32((const int32_t*)p); }
inline Ints low_nibbles(Ints b) {
  return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(b), vdupq_n_u8(15)));
}
inline Ints high_nibbles(Ints b) {
  return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(b), 4));
}
inline Ints add_products(Ints sum, Ints nibbles, Ints x) {
  const int8x16_t a = vreinterpretq_s8_s32(nibbles), b = vreinterpretq_s8_s32(x);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, a, b);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
  return vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(a, b)));
#endif
}
inline Ints times_16(Ints x) { return vshlq_n_s32(x, 4); }
inline Ints zero_ints() { return vdupq_n_s32(0); }
inline Ints add_ints(Ints a, Ints b) { return vaddq_s32(a, b); }
inline Vec to_float(Ints x) { return vcvtq_f32_s32(x); }
inline Vec spread(const float* p, int shift) {
  const float lanes[] = {p[0], p[1 >> shift], p[2 >> shift], p[3 >> shift]};
  return load(lanes);
}

#else

struct Ints {
  int32_t bytes, sum;  // four bytes, or one sum
};
inline Ints load_ints(const void* p) {
  return {four_bytes(p), four_bytes(p)};
}
inline Ints low_nibbles(Ints b) { return {b.bytes & 0x0f0f0f0f, 0}; }
inline Ints high_nibbles(Ints b) { return {(b.bytes >> 4) & 0x0f0f0f0f, 0}; }
inline Ints add_products(Ints sum, Ints nibbles, Ints x) {
  int8_t a[4], b[4];
  memcpy(a, &nibbles.bytes, 4);
  memcpy(b, &x.bytes, 4);
  for (int i = 0; i < 4; ++i) sum.sum += a[i] * b[i];
  return sum;
}
inline Ints times_16(Ints x) { return {0, x.sum * 16}; }
inline Ints zero_ints() { return {0, 0}; }
inline Ints add_ints(Ints a, Ints b) { return {0, a.sum + b.sum}; }
inline Vec to_float(Ints x) { return float(x.sum); }
inline Vec spread(const float* p, int) { return *p; }

#endif

// What one vector of weights covers: `values` of them, which x holds as bytes with a scale and a
// correction for each int32 lane.
struct Chunk {
  int64_t values;
  int shift;     // log2 of the lanes that share a scale, where they do not all share one
  bool whole;    // they do
};

constexpr int64_t values_of(int bits) { return kBytes * 8 / bits; }  // of a vector of weights

inline Chunk chunk_of(int bits, int64_t block) {
  Chunk c{values_of(bits), 0, false};
  c.whole = block % c.values == 0;
  while ((int64_t(32 / bits) << c.shift) < block) ++c.shift;
  return c;
}

// Rows of whole vectors, in blocks of whole vectors or of power-of-two parts of one that are whole
// lanes.
bool dense_fits(int64_t n_in, int bits, int64_t block) {
  const Chunk c = chunk_of(bits, block);
  return n_in % c.values == 0 &&
         (c.whole || (c.values % block == 0 && (int64_t(32 / bits) << c.shift) == block));
}

int64_t dense_bytes(int bits, int64_t n_in) {
  return n_in + n_in / values_of(bits) * kWidth * int64_t(sizeof(float) + sizeof(int32_t));
}

// The step of n values rounded to 8 bits: the largest is 127 of them.
inline float step_of(const float* x, int64_t n) {
  Vec top = splat(1e-20f);
  for (int64_t d = 0; d + kWidth <= n; d += kWidth) {
    const Vec v = load(x + d);
    top = larger(top, larger(v, sub(splat(0.0f), v)));
  }
  return largest(top) * float(1.0 / 127);
}

// n values in steps.
inline void round_values(const float* x, int64_t n, float step, int8_t* out) {
  const Vec inverse = splat(1.0f / step);
  for (int64_t d = 0; d < n; d += kWidth) save_bytes(out + d, mul(load(x + d), inverse));
}

// x as `dense_rows` reads it: bytes, then a scale and a correction for each lane.
void dense_round(const float* x, int64_t n_in, int bits, int64_t block, int8_t* out) {
  const Chunk c = chunk_of(bits, block);
  const int64_t chunks = n_in / c.values;
  const int lane_values = 32 / bits, zero = bits == 4 ? 8 : 128;
  char* const scales = (char*)out + n_in;
  char* const corrections = scales + chunks * kWidth * int64_t(sizeof(float));
  float steps[kBytes * 2 / 8];  // of one chunk's blocks, a block being at least a lane
  int8_t rounded[kBytes * 2];
  float scale = 1.0f;
  for (int64_t i = 0; i < chunks; ++i) {
    const float* from = x + i * c.values;
    const int64_t part = c.whole ? c.values : block;
    for (int64_t b = 0; b < c.values / part; ++b) {
      if (!c.whole || i * c.values % block == 0) scale = step_of(from + b * part, block);
      steps[b] = scale;
      round_values(from + b * part, part, scale, rounded + b * part);
    }
    int8_t* to = out + i * c.values;
    if (bits == 4)
      for (int j = 0; j < kBytes; ++j) to[j] = rounded[2 * j], to[kBytes + j] = rounded[2 * j + 1];
    else
      memcpy(to, rounded, kBytes);
    for (int lane = 0; lane < kWidth; ++lane) {
      int32_t sum = 0;
      for (int j = 0; j < lane_values; ++j) sum += rounded[lane * lane_values + j];
      sum *= -zero;
      memcpy(corrections + (i * kWidth + lane) * 4, &sum, 4);
      const float s = steps[c.whole ? 0 : lane >> c.shift];
      memcpy(scales + (i * kWidth + lane) * 4, &s, 4);
    }
  }
}

constexpr int kAhead = 6144;  // bytes: past the page where the hardware's own prefetch stops

// One row after the other, so that memory is one stream: four rows at a time, which saves loads of
// x, streamed half as fast.
template <int bits, bool whole>
inline void dense_span(const int8_t* x, const uint8_t* packed, const float* scales, int64_t n_in,
                       int64_t block, int64_t begin, int64_t end, float* out) {
  const Chunk c = chunk_of(bits, block);
  const int64_t chunks = n_in / c.values, blocks = n_in / block;
  const float* steps = (const float*)(x + n_in);
  const float* corrections = steps + chunks * kWidth;
  const uint8_t* from = packed + begin * (n_in * bits / 8);
  for (int64_t row = begin; row < end; ++row) {
    const float* scale = scales + row * blocks;
    const int8_t* bytes = x;
    int64_t left = block;  // values of the block that are still to come
    Vec sum = splat(0.0f);
    for (int64_t i = 0; i < chunks; ++i, from += kBytes, bytes += c.values) {
      __builtin_prefetch(from + kAhead, 0, 2);
      if (!whole) __builtin_prefetch((const char*)scale + kAhead * 32 / (bits * block), 0, 2);
      const Ints w = load_ints(from), first = load_ints(bytes);
      const Ints begin_at = load_ints(corrections + i * kWidth);
      Ints dots = add_products(begin_at, low_nibbles(w), first);
      if (bits == 4) {
        dots = add_products(dots, high_nibbles(w), load_ints(bytes + kBytes));
      } else {
        dots = add_ints(dots, times_16(add_products(zero_ints(), high_nibbles(w), first)));
      }
      const Vec weight = whole ? splat(*scale) : spread(scale, c.shift);
      sum = multiply_add(to_float(dots), mul(load(steps + i * kWidth), weight), sum);
      left -= c.values;
      if (left <= 0) scale += whole ? 1 : c.values / block, left = block;
    }
    out[row] = total(sum);
  }
}

void dense_rows(const void* x, const uint8_t* packed, const float* scales, int64_t n_in, int bits,
                int64_t block, int64_t begin, int64_t end, float* out) {
  const bool whole = chunk_of(bits, block).whole;
  const auto span = bits == 4 ? (whole ? dense_span<4, true> : dense_span<4, false>)
                              : (whole ? dense_span<8, true> : dense_span<8, false>);
  span((const int8_t*)x, packed, scales, n_in, block, begin, end, out);
}

}  // namespace
}  // namespace edge_kv
