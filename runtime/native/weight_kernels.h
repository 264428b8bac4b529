// Products of stored matrices for one instruction set; part of kernels.cpp.
//
// A vector of weights is four bytes of each of kWidth rows. Its parts, fields of `bits` bits in each
// byte, become bytes and meet four values of x, the same for all rows; an int32 lane adds the four
// products. Where the CPU multiplies unsigned bytes with signed ones, weights stay as stored, above
// zero, and what that adds is subtracted: `kZero` times the sum of the block of x. Two products of
// weights that take all 8 bits (`kWide`) overflow 16 bits; one does not, nor do sixteen of others, so
// that they are added in 16 bits through a block (`kShort`).
#pragma once

#include "simd.h"

namespace edge_kv {
namespace {

constexpr int kBytes = 4 * kWidth;             // of a vector
constexpr int kVectors = kGroupRows / kWidth;  // of a line
constexpr int kUnroll = kWidth > 1 ? 8 : 1;  // so that sums stay in registers
constexpr int kBytesAhead = 6144;          // past the page where the hardware's own prefetch stops

// Of weights that take all 8 bits.
template <int bits, bool levels>
constexpr bool kWide = levels || bits == 8;

#if defined(__AVX512BW__)

using Ints = __m512i;
inline Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline Vec to_float(Ints x) { return _mm512_cvtepi32_ps(x); }
constexpr int kFewTokens = 8;
#if defined(__AVX512VNNI__)
template <int bits, bool levels>
constexpr bool kShort = false;
#else
template <int bits, bool levels>
constexpr bool kShort = !kWide<bits, levels>;
#endif
template <int bits, bool levels>
constexpr int kZero = levels ? 128 : 1 << (bits - 1);
inline Ints four_values(const int8_t* x) { return _mm512_set1_epi32(four_bytes(x)); }
inline Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints halved(Ints x, int times) { return _mm512_srai_epi32(x, unsigned(times)); }
inline Ints add_pairs(Ints sum, Ints pairs) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
template <int bits, bool levels>
inline Ints part_of(Ints w, int part) {
  if (bits == 8) return w;
  w = _mm512_and_si512(_mm512_srli_epi16(w, unsigned(part * bits)),
                       _mm512_set1_epi8((1 << bits) - 1));
  if (!levels) return w;
  const __m128i table = _mm_xor_si128(_mm_loadu_si128((const __m128i*)kLevels), _mm_set1_epi8(-128));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), w);
}
template <int bits, bool levels>
inline Ints add_part(Ints sum, Ints w, Ints x) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sum, w, x);
#else
  const Ints low = _mm512_set1_epi16(255), ones = _mm512_set1_epi16(1);
  if (kShort<bits, levels>) return _mm512_add_epi16(sum, _mm512_maddubs_epi16(w, x));
  const Ints even = _mm512_maddubs_epi16(_mm512_and_si512(w, low), x);
  const Ints odd = _mm512_maddubs_epi16(_mm512_andnot_si512(low, w), x);
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, ones));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(odd, ones));
#endif
}

#elif defined(__AVX2__)

using Ints = __m256i;
inline Ints load_ints(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Vec to_float(Ints x) { return _mm256_cvtepi32_ps(x); }
constexpr int kFewTokens = 4;
template <int bits, bool levels>
constexpr bool kShort = !kWide<bits, levels>;
template <int bits, bool levels>
constexpr int kZero = levels ? 0 : 1 << (bits - 1);
inline Ints four_values(const int8_t* x) { return _mm256_set1_epi32(four_bytes(x)); }
inline Ints splat_int(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints halved(Ints x, int times) { return _mm256_srai_epi32(x, times); }
inline Ints add_pairs(Ints sum, Ints pairs) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
template <int bits, bool levels>
inline Ints part_of(Ints w, int part) {
  if (bits == 8) return w;
  w = _mm256_and_si256(_mm256_srli_epi16(w, part * bits), _mm256_set1_epi8((1 << bits) - 1));
  if (!levels) return w;
  const __m128i table = _mm_loadu_si128((const __m128i*)kLevels);
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), w);
}
template <int bits, bool levels>
inline Ints add_part(Ints sum, Ints w, Ints x) {
  const Ints low = _mm256_set1_epi16(255), ones = _mm256_set1_epi16(1);
  if (levels) {  // of at most 127: with the signs of x, two products fit 16 bits
    const Ints products = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(products, ones));
  }
  if (kShort<bits, levels>) return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
  const Ints even = _mm256_maddubs_epi16(_mm256_and_si256(w, low), x);
  const Ints odd = _mm256_maddubs_epi16(_mm256_andnot_si256(low, w), x);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, ones));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, ones));
}

#elif defined(__ARM_NEON) && !defined(EDGE_KV_SCALAR)

using Ints = int32x4_t;
inline Ints load_ints(const void* p) { return vld1q_s32((const int32_t*)p); }
inline Vec to_float(Ints x) { return vcvtq_f32_s32(x); }
constexpr int kFewTokens = 4;
template <int bits, bool levels>
constexpr bool kShort = false;
template <int bits, bool levels>
constexpr int kZero = levels || bits == 8 ? 0 : 1 << (bits - 1);
inline Ints four_values(const int8_t* x) { return vdupq_n_s32(four_bytes(x)); }
inline Ints splat_int(int32_t x) { return vdupq_n_s32(x); }
inline Ints halved(Ints x, int times) { return vshlq_s32(x, vdupq_n_s32(-times)); }
inline Ints add_pairs(Ints sum, Ints) { return sum; }
template <int bits, bool levels>
inline Ints part_of(Ints w, int part) {
  uint8x16_t bytes = vreinterpretq_u8_s32(w);
  if (bits == 8) return vreinterpretq_s32_u8(veorq_u8(bytes, vdupq_n_u8(128)));
  bytes = vandq_u8(vshlq_u8(bytes, vdupq_n_s8(int8_t(-part * bits))), vdupq_n_u8((1 << bits) - 1));
  if (!levels) return vreinterpretq_s32_u8(bytes);
  return vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(kLevels), bytes));
}
template <int bits, bool levels>
inline Ints add_part(Ints sum, Ints w, Ints x) {
  const int8x16_t a = vreinterpretq_s8_s32(w), b = vreinterpretq_s8_s32(x);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, a, b);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  if (!kWide<bits, levels>) return vpadalq_s16(sum, vpaddq_s16(low, high));
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

#else

struct Ints {
  int32_t bytes, sum;  // four bytes, or one sum
};
inline Ints load_ints(const void* p) { return {four_bytes(p), 0}; }
inline Vec to_float(Ints x) { return float(x.sum); }
constexpr int kFewTokens = 1;
template <int bits, bool levels>
constexpr bool kShort = false;
template <int bits, bool levels>
constexpr int kZero = levels || bits == 8 ? 0 : 1 << (bits - 1);
inline Ints four_values(const int8_t* x) { return load_ints(x); }
inline Ints splat_int(int32_t x) { return {0, x}; }
inline Ints halved(Ints x, int times) { return {0, x.sum / (1 << times)}; }
inline Ints add_pairs(Ints sum, Ints) { return sum; }
template <int bits, bool levels>
inline Ints part_of(Ints w, int part) {
  if (bits == 8) return {int32_t(uint32_t(w.bytes) ^ 0x80808080u), 0};
  uint32_t fields = (uint32_t(w.bytes) >> (part * bits)) & 0x01010101u * ((1u << bits) - 1);
  if (levels) {
    uint8_t b[4];
    memcpy(b, &fields, 4);
    for (uint8_t& index : b) index = uint8_t(kLevels[index]);
    memcpy(&fields, b, 4);
  }
  return {int32_t(fields), 0};
}
template <int bits, bool levels>
inline Ints add_part(Ints sum, Ints w, Ints x) {
  int8_t a[4], b[4];
  memcpy(a, &w.bytes, 4);
  memcpy(b, &x.bytes, 4);
  for (int i = 0; i < 4; ++i) sum.sum += a[i] * b[i];
  return sum;
}

#endif

// A block of a token's rounded activations; `start` is -128 times the sum of its values.
struct RoundedBlock {
  int8_t values[kBlockValues];
  float step;
  int32_t start;
};

// The step of a block rounded to 8 bits: the largest value is 127 of them.
inline float step_of(const float* x) {
  Vec top = splat(1e-20f);
  for (int i = 0; i < kBlockValues; i += kWidth) {
    const Vec v = load(x + i);
    top = larger(top, larger(v, sub(splat(0.0f), v)));
  }
  return largest(top) * float(1.0 / 127);
}

// A block in its own steps.
inline void round_block(const float* x, float step, int8_t* out) {
  const Vec inverse = splat(1.0f / step);
  for (int i = 0; i < kBlockValues; i += kWidth) save_bytes(out + i, mul(load(x + i), inverse));
}

// The same in steps of which its largest value need not be 127.
inline void round_block_to(float step, const float* x, int8_t* out) {
  const Vec by = splat(step);
  for (int i = 0; i < kBlockValues; i += kWidth) save_bytes(out + i, whole_steps(load(x + i), by));
}

void round_row(const float* x, int64_t cols, float fixed, void* out) {
  RoundedBlock* to = (RoundedBlock*)out;
  for (int64_t begin = 0; begin < cols; begin += kBlockValues, ++to) {
    const float* from = x + begin;
    float block[kBlockValues];
    const int64_t n = cols - begin;
    if (n < kBlockValues) {  // the last of them
      memset(block, 0, sizeof block);
      from = (const float*)memcpy(block, from, sizeof(float) * size_t(n));
    }
    to->step = fixed != 0.0f ? fixed : step_of(from);
    if (fixed != 0.0f) {
      round_block_to(fixed, from, to->values);
    } else {
      round_block(from, to->step, to->values);
    }
    to->start = -128 * sum_of_32(to->values);
  }
}

// 0 … N - 1 as a type; std::integer_sequence is of the standard library (see kernels.cpp).
template <int...>
struct Sequence {};
template <int N, int... Rest>
struct Counted : Counted<N - 1, N - 1, Rest...> {};
template <int... All>
struct Counted<0, All...> {
  using type = Sequence<All...>;
};
template <int N>
using UpTo = typename Counted<N>::type;

template <Scale scale>
inline Vec block_scales(const uint8_t* line, int block, int vector) {
  const int at = block * kGroupRows + vector * kWidth;
  if (scale == Scale::s8) return load((const int8_t*)line + at);
  return load((const uint16_t*)line + at);
}

// A prefetch that stays behind the loads before it.
inline void fetch_now(const uint8_t* p) {
#if defined(__x86_64__)
  __asm__ volatile("prefetcht0 %0" ::"m"(*p));
#else
  __builtin_prefetch(p);
#endif
}

// What the products of a block begin with: -zero times the sum of its values.
template <int zero>
inline Ints start_of(const RoundedBlock& block) {
  constexpr int times = zero == 128 ? 0 : zero == 8 ? 4 : 6;
  static_assert(zero == 0 || zero << times == 128, "a start is halved to that of a lower zero");
  return zero ? halved(splat_int(block.start), times) : splat_int(0);
}

// One group of rows with T tokens: sixteen numbers for each.
template <int bits, Scale scale, bool levels, int T>
void group_tokens(const uint8_t* from, int64_t blocks, const uint8_t* x, int64_t x_stride,
                  float* out, int64_t stride) {
  constexpr Format format{"", bits, scale, levels};
  constexpr int parts = 8 / bits, zero = kZero<bits, levels>;
  // Few tokens wait for memory: what is read now is asked for before what is read later.
  constexpr bool late = T <= 2;
  const float* row_scales = (const float*)from;
  const uint8_t* scales = nullptr;
  from += format.head() * kLineBytes;
  Vec sums[T][kVectors];
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < kVectors; ++v) sums[t][v] = splat(0.0f);
  int left = 0;  // blocks that the line of scales still serves
  for (int64_t b = 0; b < blocks; ++b, x += sizeof(RoundedBlock)) {
    const auto block = [&](int t) -> const RoundedBlock& {
      return *(const RoundedBlock*)(x + t * x_stride);
    };
    if (format.served() && left-- == 0) {
      __builtin_prefetch(from + kBytesAhead);
      scales = from;
      from += kLineBytes;
      left = format.served() - 1;
    }
    Ints dots[T][kVectors];
    for (int t = 0; t < T; ++t) {
      const Ints start = kShort<bits, levels> ? splat_int(0) : start_of<zero>(block(t));
      for (int v = 0; v < kVectors; ++v) dots[t][v] = start;
    }
#pragma GCC unroll kUnroll
    for (int line = 0; line < bits; ++line, from += kLineBytes) {
      if (!late) __builtin_prefetch(from + kBytesAhead);
#pragma GCC unroll kUnroll
      for (int p = 0; p < parts; ++p) {
        Ints w[kVectors];
        for (int v = 0; v < kVectors; ++v)
          w[v] = part_of<bits, levels>(load_ints(from + v * kBytes), p);
#pragma GCC unroll kUnroll
        for (int t = 0; t < T; ++t) {
          const Ints four = four_values(block(t).values + (line * parts + p) * 4);
          for (int v = 0; v < kVectors; ++v)
            dots[t][v] = add_part<bits, levels>(dots[t][v], w[v], four);
        }
      }
    }
    for (int line = 0; late && line < bits; ++line)
      fetch_now(from + kBytesAhead + (line - bits) * kLineBytes);
    for (int v = 0; v < kVectors; ++v) {
      const Vec by = format.served() ? block_scales<scale>(scales, format.served() - 1 - left, v)
                                     : splat(1.0f);
      for (int t = 0; t < T; ++t) {
        const Vec step = splat(block(t).step);
        if (kShort<bits, levels>) dots[t][v] = add_pairs(start_of<zero>(block(t)), dots[t][v]);
        sums[t][v] = multiply_add(to_float(dots[t][v]), format.served() ? mul(by, step) : step,
                                  sums[t][v]);
      }
    }
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < kVectors; ++v) {
      const Vec y = sums[t][v];
      save(out + t * stride + v * kWidth,
           format.head() ? mul(y, load(row_scales + v * kWidth)) : y);
    }
}

using GroupTokens = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, float*, int64_t);

// group_tokens for 1 … kFewTokens tokens.
template <int bits, Scale scale, bool levels, int... Fewer>
const GroupTokens* kernels_of(Sequence<Fewer...>) {
  static constexpr GroupTokens kernels[] = {group_tokens<bits, scale, levels, Fewer + 1>...};
  return kernels;
}

// All tokens with one group after the other; its weights come from memory once. More tokens than a
// kernel takes are parted as evenly as can be.
template <int bits, Scale scale, bool levels>
void groups_tokens(const uint8_t* data, int64_t groups, int64_t group_bytes, int64_t blocks,
                   const uint8_t* x, int64_t x_stride, int64_t tokens, float* out, int64_t stride,
                   int64_t rows) {
  const GroupTokens* kernels = kernels_of<bits, scale, levels>(UpTo<kFewTokens>());
  for (int64_t g = 0; g < groups; ++g, data += group_bytes, out += kGroupRows, rows -= kGroupRows) {
    const int64_t n = rows < kGroupRows ? rows : kGroupRows;
    int64_t parts = (tokens + kFewTokens - 1) / kFewTokens;
    for (int64_t t = 0, count; t < tokens; t += count, --parts) {
      count = (tokens - t + parts - 1) / parts;
      const GroupTokens kernel = kernels[count - 1];
      if (n == kGroupRows) {
        kernel(data, blocks, x + t * x_stride, x_stride, out + t * stride, stride);
        continue;
      }
      float whole[kFewTokens * kGroupRows];
      kernel(data, blocks, x + t * x_stride, x_stride, whole, kGroupRows);
      for (int64_t i = 0; i < count; ++i)
        memcpy(out + (t + i) * stride, whole + i * kGroupRows, sizeof(float) * size_t(n));
    }
  }
}

void multiply_groups(const Format& f, const uint8_t* data, int64_t groups, int64_t blocks,
                     const uint8_t* x, int64_t x_stride, int64_t tokens, float* out, int64_t stride,
                     int64_t rows) {
  const auto with = [&](auto call) {
    const int64_t lines = f.served() ? (blocks + f.served() - 1) / f.served() : 0;
    call(data, groups, (f.head() + lines + blocks * f.bits) * kLineBytes, blocks, x, x_stride, tokens,
         out, stride, rows);
  };
  switch (f.scale) {
    case Scale::s8:
      return f.bits == 8 ? with(groups_tokens<8, Scale::s8, false>)
             : f.levels  ? with(groups_tokens<4, Scale::s8, true>)
                         : with(groups_tokens<4, Scale::s8, false>);
    case Scale::f16:
      return f.bits == 8 ? with(groups_tokens<8, Scale::f16, false>)
             : f.levels  ? with(groups_tokens<4, Scale::f16, true>)
                         : with(groups_tokens<4, Scale::f16, false>);
    case Scale::row:
      return f.bits == 8   ? with(groups_tokens<8, Scale::row, false>)
             : f.bits == 4 ? with(groups_tokens<4, Scale::row, false>)
                           : with(groups_tokens<2, Scale::row, false>);
  }
}

}  // namespace
}  // namespace edge_kv
