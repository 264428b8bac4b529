// A float vector for each instruction set, with the few operations that kernels.cpp needs.
//
// Everything has internal linkage: the same names mean other instructions in another object file.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

inline int32_t four_bytes(const void* p) {
  int32_t bytes;
  memcpy(&bytes, p, 4);
  return bytes;
}

inline float half_bits_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, fraction = half & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (fraction << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else {
    const float tiny = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&bits, &tiny, 4);
    bits |= sign;
  }
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest even; overflow is infinity.
inline uint16_t float_to_half_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  if (bits >= 0x7f800000u) return uint16_t(sign | (bits > 0x7f800000u ? 0x7e00 : 0x7c00));
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00);
  if (bits < 0x38800000u) {  // subnormal: the float adder rounds at 2^-24
    float shifted;
    memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    memcpy(&bits, &shifted, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  const uint32_t odd = (bits >> 13) & 1;
  return uint16_t(sign | ((bits - 0x38000000u + 0xfff + odd) >> 13));
}

#if defined(__AVX512F__)

constexpr int kWidth = 16;
constexpr int kRows = 8;  // query rows of one register block: 8 x 2 sums, 2 keys, 1 query
using Vec = __m512;
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline Vec load(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void save(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void save(uint16_t* p, Vec x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// To the nearest integers, which are bytes.
inline void save_bytes(int8_t* p, Vec x) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline float total(Vec x) { return _mm512_reduce_add_ps(x); }
inline __m256 halves_added(Vec x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
inline float largest(Vec x) { return _mm512_reduce_max_ps(x); }
inline Vec nearest(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }

#elif defined(__AVX2__)

constexpr int kWidth = 8;
constexpr int kRows = 4;
using Vec = __m256;
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline Vec load(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void save(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline void save(uint16_t* p, Vec x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void save_bytes(int8_t* p, Vec x) {
  const __m256i whole = _mm256_cvtps_epi32(x);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline __m256 halves_added(Vec x) { return x; }
inline float total(Vec x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(Vec x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}

#elif defined(__ARM_NEON) && !defined(EDGE_KV_SCALAR)

constexpr int kWidth = 4;
constexpr int kRows = 8;
using Vec = float32x4_t;
inline Vec load(const float* p) { return vld1q_f32(p); }
inline Vec load(const int8_t* p) {
  uint32_t four;
  memcpy(&four, p, 4);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
inline Vec load(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void save(float* p, Vec x) { vst1q_f32(p, x); }
inline void save(uint16_t* p, Vec x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
inline void save_bytes(int8_t* p, Vec x) {
  const int16x4_t words = vmovn_s32(vcvtnq_s32_f32(x));
  const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
  memcpy(p, &bytes, 4);
}
inline Vec splat(float x) { return vdupq_n_f32(x); }
inline Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec divide(Vec a, Vec b) { return vdivq_f32(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec larger(Vec a, Vec b) { return vmaxq_f32(a, b); }
inline Vec smaller(Vec a, Vec b) { return vminq_f32(a, b); }
inline float total(Vec x) { return vaddvq_f32(x); }
inline float largest(Vec x) { return vmaxvq_f32(x); }
inline Vec nearest(Vec x) { return vrndnq_f32(x); }
inline Vec power_of_two(Vec n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}

#else

constexpr int kWidth = 1;
constexpr int kRows = 4;
using Vec = float;
inline Vec load(const float* p) { return *p; }
inline Vec load(const int8_t* p) { return float(*p); }
inline Vec load(const uint16_t* p) { return half_bits_to_float(*p); }
inline void save(float* p, Vec x) { *p = x; }
inline void save(uint16_t* p, Vec x) { *p = float_to_half_bits(x); }
inline void save_bytes(int8_t* p, Vec x) { *p = int8_t(int(rintf(x))); }
inline Vec splat(float x) { return x; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec divide(Vec a, Vec b) { return a / b; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
inline float total(Vec x) { return x; }
inline float largest(Vec x) { return x; }
inline Vec nearest(Vec x) { return rintf(x); }
inline Vec power_of_two(Vec n) { return ldexpf(1.0f, int(n)); }

#endif

// x / step to the nearest of -128 … 127. What is no number stays so: with those, the second operand
// is the result.
inline Vec whole_steps(Vec x, Vec step) {
  return nearest(smaller(splat(127.0f), larger(splat(-128.0f), divide(x, step))));
}

inline float value_of(float x) { return x; }
inline float value_of(int8_t x) { return float(x); }
inline float value_of(uint16_t x) { return half_bits_to_float(x); }

inline int32_t sum_of_32(const int8_t* p) {
#if defined(__AVX2__)
  const __m256i bytes = _mm256_loadu_si256((const __m256i*)p);
  const __m256i sums =
      _mm256_sad_epu8(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
  const __m128i two =
      _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 2) - 32 * 128;
#elif defined(__ARM_NEON) && !defined(EDGE_KV_SCALAR)
  return vaddlvq_s8(vld1q_s8(p)) + vaddlvq_s8(vld1q_s8(p + 16));
#else
  int32_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += p[i];
  return sum;
#endif
}

// Totals of a and b side by side, and of c and d.
inline void save_totals(Vec a, Vec b, Vec c, Vec d, float* to_ab, float* to_cd) {
#if defined(__AVX2__)
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(halves_added(a), halves_added(b)),
                                    _mm256_hadd_ps(halves_added(c), halves_added(d)));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  _mm_storel_pi((__m64*)to_ab, four);
  _mm_storeh_pi((__m64*)to_cd, four);
#elif defined(__ARM_NEON) && !defined(EDGE_KV_SCALAR)
  const float32x4_t four = vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
  vst1_f32(to_ab, vget_low_f32(four));
  vst1_f32(to_cd, vget_high_f32(four));
#else
  to_ab[0] = a, to_ab[1] = b, to_cd[0] = c, to_cd[1] = d;
#endif
}

// exp(x) for x <= 0, relative error below 2e-7; arguments below -87 give exp(-87), about 1.6e-38.
// Range reduction and polynomial of Cephes' expf.
inline Vec exponential(Vec x) {
  x = larger(x, splat(-87.0f));
  const Vec n = nearest(mul(x, splat(1.44269504f)));
  const Vec r = multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x));
  Vec p = splat(1.9875691500e-4f);
  p = multiply_add(p, r, splat(1.3981999507e-3f));
  p = multiply_add(p, r, splat(8.3334519073e-3f));
  p = multiply_add(p, r, splat(4.1665795894e-2f));
  p = multiply_add(p, r, splat(1.6666665459e-1f));
  p = multiply_add(p, r, splat(5.0000001201e-1f));
  p = multiply_add(mul(p, r), r, add(r, splat(1.0f)));
  return mul(p, power_of_two(n));
}

}  // namespace
