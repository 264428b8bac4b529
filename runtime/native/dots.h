// Exact integer products of stored int8 rows with 16-bit numbers, for each instruction set.
//
// A 16-bit number is kDigits digits: one int16 where the CPU multiplies pairs of int16 (x86), two
// int8 (256 * high + low) where it multiplies fours of int8 (NEON with dot products). A 32-bit lane
// holds kGroup digits; dot_add adds the products of each lane's digits to an int32 of that lane.
// EDGE_KV_DOTS is defined where the instruction set has this, EDGE_KV_TILES where tiles of rows that
// are put in order first are faster (with 512 bits they are not, measured).
#pragma once

#include "simd.h"

#if defined(__AVX512BW__) || defined(__AVX2__) || \
    (defined(__ARM_FEATURE_DOTPROD) && !defined(EDGE_KV_SCALAR))
#define EDGE_KV_DOTS
#if defined(__AVX2__) && !defined(__AVX512BW__)
#define EDGE_KV_TILES
#endif

namespace {

#if defined(__AVX512BW__)

using Digit = int16_t;
using Digits = __m512i;
using Dots = __m512i;
constexpr int kDotRows = 8;
inline Dots no_dots() { return _mm512_setzero_si512(); }
inline Digits load_digits(const Digit* p) { return _mm512_loadu_si512(p); }
inline Digits splat_group(const Digit* p) { return _mm512_set1_epi32(four_bytes(p)); }
inline Digits widen(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
}
inline Dots dot_add(Dots sum, Digits a, Digits b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
inline Vec as_floats(const Dots (&sum)[1]) { return _mm512_cvtepi32_ps(sum[0]); }
inline __m256i halves_added(Dots x) {
  return _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
}
inline void columns(const int8_t* const (&rows)[2], Digits (&out)[2]) {
  const Digits a = widen(rows[0]), b = widen(rows[1]);
  out[0] = _mm512_unpacklo_epi16(a, b);
  out[1] = _mm512_unpackhi_epi16(a, b);
}
inline void in_order(Vec& a, Vec& b) {
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  a = _mm512_castpd_ps(_mm512_permutex2var_pd(x, low, y));
  b = _mm512_castpd_ps(_mm512_permutex2var_pd(x, high, y));
}
inline void save_digits(Digit* to, int, Vec x) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
}

#elif defined(__AVX2__)

using Digit = int16_t;
using Digits = __m256i;
using Dots = __m256i;
constexpr int kDotRows = 4;
inline Dots no_dots() { return _mm256_setzero_si256(); }
inline Digits load_digits(const Digit* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Digits splat_group(const Digit* p) { return _mm256_set1_epi32(four_bytes(p)); }
inline Digits widen(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
}
inline Dots dot_add(Dots sum, Digits a, Digits b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
// Of each four bytes the first and third, and the second and fourth, as pairs of digits.
inline Digits evens(Digits x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
inline Digits odds(Digits x) { return _mm256_srai_epi16(x, 8); }
// Four digits 0 1 2 3 as 0 2 1 3: how evens and odds meet them.
inline Digits evens_first(Digits x) {
  return _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(x, 0xd8), 0xd8);
}
inline Digits load_packed(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void save_packed(void* p, Digits x) { _mm256_storeu_si256((__m256i*)p, x); }
// Four bytes i of vector j become four bytes j of vector i.
inline void transpose_fours(Digits (&r)[kWidth]) {
  Digits t[kWidth];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
// Byte i of four rows becomes four bytes i: of all 4 * kWidth, in order.
inline void interleave(Digits (&r)[4]) {
  const Digits a = _mm256_unpacklo_epi8(r[0], r[1]), b = _mm256_unpackhi_epi8(r[0], r[1]);
  const Digits c = _mm256_unpacklo_epi8(r[2], r[3]), d = _mm256_unpackhi_epi8(r[2], r[3]);
  const Digits w = _mm256_unpacklo_epi16(a, c), x = _mm256_unpackhi_epi16(a, c);
  const Digits y = _mm256_unpacklo_epi16(b, d), z = _mm256_unpackhi_epi16(b, d);
  r[0] = _mm256_permute2x128_si256(w, x, 0x20);
  r[1] = _mm256_permute2x128_si256(y, z, 0x20);
  r[2] = _mm256_permute2x128_si256(w, x, 0x31);
  r[3] = _mm256_permute2x128_si256(y, z, 0x31);
}
inline Vec as_floats(const Dots (&sum)[1]) { return _mm256_cvtepi32_ps(sum[0]); }
inline __m256i halves_added(Dots x) { return x; }
inline void columns(const int8_t* const (&rows)[2], Digits (&out)[2]) {
  const Digits a = widen(rows[0]), b = widen(rows[1]);
  out[0] = _mm256_unpacklo_epi16(a, b);
  out[1] = _mm256_unpackhi_epi16(a, b);
}
inline void in_order(Vec& a, Vec& b) {
  const Vec low = _mm256_permute2f128_ps(a, b, 0x20);
  b = _mm256_permute2f128_ps(a, b, 0x31);
  a = low;
}
inline void save_digits(Digit* to, int, Vec x) {
  const __m256i whole = _mm256_cvtps_epi32(x);
  _mm_storeu_si128((__m128i*)to, _mm_packs_epi32(_mm256_castsi256_si128(whole),
                                                 _mm256_extracti128_si256(whole, 1)));
}

#else

using Digit = int8_t;
using Digits = int8x16_t;
using Dots = int32x4_t;
constexpr int kDotRows = 4;
inline Dots no_dots() { return vdupq_n_s32(0); }
inline Digits load_digits(const Digit* p) { return vld1q_s8(p); }
inline Digits splat_group(const Digit* p) {
  return vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(p)));
}
inline Digits widen(const int8_t* p) { return vld1q_s8(p); }
inline Dots dot_add(Dots sum, Digits a, Digits b) { return vdotq_s32(sum, a, b); }
inline Dots joined(const Dots (&sum)[2]) { return vaddq_s32(vshlq_n_s32(sum[0], 8), sum[1]); }
inline Vec as_floats(const Dots (&sum)[2]) { return vcvtq_f32_s32(joined(sum)); }
inline void columns(const int8_t* const (&rows)[4], Digits (&out)[2]) {
  int8x16_t row[4];
  for (int i = 0; i < 4; ++i) row[i] = vcombine_s8(vld1_s8(rows[i]), vdup_n_s8(0));
  const int16x8_t a = vreinterpretq_s16_s8(vzip1q_s8(row[0], row[1]));
  const int16x8_t b = vreinterpretq_s16_s8(vzip1q_s8(row[2], row[3]));
  out[0] = vreinterpretq_s8_s16(vzip1q_s16(a, b));
  out[1] = vreinterpretq_s8_s16(vzip2q_s16(a, b));
}
inline void in_order(Vec&, Vec&) {}
inline void save_digits(Digit* to, int stride, Vec x) {
  const int32x4_t whole = vcvtnq_s32_f32(x);
  const int32x4_t high = vshrq_n_s32(vaddq_s32(whole, vdupq_n_s32(128)), 8);
  const int32x4_t digits[2] = {high, vsubq_s32(whole, vshlq_n_s32(high, 8))};
  for (int g = 0; g < 2; ++g) {
    const int16x4_t narrow = vmovn_s32(digits[g]);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(narrow, narrow));
    vst1_lane_s32((int32_t*)(to + g * stride), vreinterpret_s32_s8(bytes), 0);
  }
}

#endif

constexpr int kDigits = 2 / int(sizeof(Digit));
constexpr int kGroup = 4 / int(sizeof(Digit));
constexpr int kSpan = kWidth * kGroup;      // digits of a register
constexpr float kLargest = 127.0f * 256.0f;  // of a number whose digits are both balanced

// Two numbers of two rows: the lanes of each sum added up, exact as long as they fit an int32.
inline void save_totals(const Dots (&a)[2][kDigits], const Dots (&b)[2][kDigits], float* to_a,
                        float* to_b) {
#if defined(__AVX2__)
  const __m256i x = halves_added(a[0][0]), y = halves_added(a[1][0]);
  const __m256i z = halves_added(b[0][0]), w = halves_added(b[1][0]);
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(x, y), _mm256_hadd_epi32(z, w));
  const __m128 four = _mm_cvtepi32_ps(
      _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
  _mm_storel_pi((__m64*)to_a, four);
  _mm_storeh_pi((__m64*)to_b, four);
#else
  const int32x4_t x = vpaddq_s32(joined(a[0]), joined(a[1]));
  const float32x4_t four = vcvtq_f32_s32(vpaddq_s32(x, vpaddq_s32(joined(b[0]), joined(b[1]))));
  vst1_f32(to_a, vget_low_f32(four));
  vst1_f32(to_b, vget_high_f32(four));
#endif
}

}  // namespace

#endif
