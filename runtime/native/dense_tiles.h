// The integer product with many tokens for one instruction set; part of kernels.cpp.
//
// A tile is kTileRows rows of weights. Its values are unpacked once, so that a vector holds four
// bytes of each of kWidth rows, and then meet kTileTokens tokens at a time: sums stay in registers,
// four bytes of a token go to all lanes. Of 4-bit weights a vector of low nibbles comes before the
// vector of high ones, so of eight values of x the even ones come first.
#pragma once

#include "dense_kernels.h"

namespace edge_kv {
namespace {

constexpr int kTileVectors = 2;
constexpr int kTileRows = kTileVectors * kWidth;
constexpr int kTileAhead = 256;  // bytes of a row that are fetched ahead
constexpr int kRounded = 64;  // values rounded at a time, eights that are put in order

#if defined(__AVX512BW__)

constexpr int kTileTokens = 6;
constexpr int kByteZero = 128;  // what a stored byte is above its weight, as add_bytes takes it
inline Ints splat_ints(int32_t x) { return _mm512_set1_epi32(x); }
inline void save_ints(void* p, Ints x) { _mm512_storeu_si512(p, x); }
// Lane j of vector i becomes lane i of vector j.
inline void transpose(Ints (&r)[kWidth]) {
  Ints t[kWidth];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88);
    r[4 + i] = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd);
  }
}
inline Ints as_byte_weights(Ints b) { return b; }
inline Ints add_bytes(Ints sum, Ints w, Ints x) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sum, w, x);
#else
  const Ints low = _mm512_set1_epi16(255), ones = _mm512_set1_epi16(1);
  const Ints even = _mm512_maddubs_epi16(_mm512_and_si512(w, low), x);
  const Ints odd = _mm512_maddubs_epi16(_mm512_andnot_si512(low, w), x);
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, ones));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(odd, ones));
#endif
}

#elif defined(__AVX2__)

constexpr int kTileTokens = 4;
constexpr int kByteZero = 128;
inline Ints splat_ints(int32_t x) { return _mm256_set1_epi32(x); }
inline void save_ints(void* p, Ints x) { _mm256_storeu_si256((__m256i*)p, x); }
inline void transpose(Ints (&r)[kWidth]) {
  Ints t[kWidth];
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
    const Ints low = r[i];
    r[i] = _mm256_permute2x128_si256(low, r[4 + i], 0x20);
    r[4 + i] = _mm256_permute2x128_si256(low, r[4 + i], 0x31);
  }
}
inline Ints as_byte_weights(Ints b) { return b; }
// Two products of a byte of 255 overflow the 16 bits of maddubs, one does not.
inline Ints add_bytes(Ints sum, Ints w, Ints x) {
  const Ints low = _mm256_set1_epi16(255), ones = _mm256_set1_epi16(1);
  const Ints even = _mm256_maddubs_epi16(_mm256_and_si256(w, low), x);
  const Ints odd = _mm256_maddubs_epi16(_mm256_andnot_si256(low, w), x);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, ones));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, ones));
}

#elif defined(__ARM_NEON) && !defined(EDGE_KV_SCALAR)

constexpr int kTileTokens = 6;
constexpr int kByteZero = 0;
inline Ints splat_ints(int32_t x) { return vdupq_n_s32(x); }
inline void save_ints(void* p, Ints x) { vst1q_s32((int32_t*)p, x); }
inline void transpose(Ints (&r)[kWidth]) {
  const int64x2_t a = vreinterpretq_s64_s32(vtrn1q_s32(r[0], r[1]));
  const int64x2_t b = vreinterpretq_s64_s32(vtrn2q_s32(r[0], r[1]));
  const int64x2_t c = vreinterpretq_s64_s32(vtrn1q_s32(r[2], r[3]));
  const int64x2_t d = vreinterpretq_s64_s32(vtrn2q_s32(r[2], r[3]));
  r[0] = vreinterpretq_s32_s64(vtrn1q_s64(a, c));
  r[1] = vreinterpretq_s32_s64(vtrn1q_s64(b, d));
  r[2] = vreinterpretq_s32_s64(vtrn2q_s64(a, c));
  r[3] = vreinterpretq_s32_s64(vtrn2q_s64(b, d));
}
inline Ints as_byte_weights(Ints b) { return veorq_s32(b, vdupq_n_s32(int(0x80808080u))); }
inline Ints add_bytes(Ints sum, Ints w, Ints x) { return add_products(sum, w, x); }

#else

constexpr int kTileTokens = 2;
constexpr int kByteZero = 0;
inline Ints splat_ints(int32_t x) { return {x, x}; }
inline void save_ints(void* p, Ints x) { memcpy(p, &x.bytes, 4); }
inline void transpose(Ints (&)[kWidth]) {}
inline Ints as_byte_weights(Ints b) { return {int32_t(uint32_t(b.bytes) ^ 0x80808080u), 0}; }
inline Ints add_bytes(Ints sum, Ints w, Ints x) { return add_products(sum, w, x); }

#endif

// kRun groups of four bytes of a token, and sums with group g of them.
#if defined(__ARM_FEATURE_DOTPROD) && !defined(EDGE_KV_SCALAR)
constexpr int kRun = 4;
inline Ints load_run(const int8_t* p) { return load_ints(p); }
template <int bits, int g>
inline Ints add_group(Ints sum, Ints w, Ints run) {
  const int8x16_t a = vreinterpretq_s8_s32(w), b = vreinterpretq_s8_s32(run);
  return vdotq_laneq_s32(sum, a, b, g);
}
#else
constexpr int kRun = 1;
inline Ints load_run(const int8_t* p) { return splat_ints(four_bytes(p)); }
template <int bits, int>
inline Ints add_group(Ints sum, Ints w, Ints run) {
  return bits == 4 ? add_products(sum, w, run) : add_bytes(sum, w, run);
}
#endif

// One token as a tile meets it: bytes [n_in], scales [blocks], corrections [blocks].
struct Token {
  int8_t* bytes;
  float* scales;
  int32_t* corrections;

  Token(void* x, int64_t n_in, int64_t block)
      : bytes((int8_t*)x), scales((float*)(bytes + n_in)),
        corrections((int32_t*)(scales + n_in / block)) {}
};

// Rows of whole vectors, in blocks of whole groups of four packed bytes, whole runs and whole
// vectors of floats.
bool tiles_fit(int64_t n_in, int bits, int64_t block) {
  return n_in * bits / 8 % kBytes == 0 && n_in % block == 0 && block % (32 / bits) == 0 &&
         block % (4 * kRun) == 0 && block % kWidth == 0;
}

int64_t tile_token_bytes(int64_t n_in, int64_t block) { return n_in + n_in / block * 8; }

inline uint64_t even_bytes(uint64_t eight) {
  eight &= 0x00ff00ff00ff00ffull;
  eight = (eight | eight >> 8) & 0x0000ffff0000ffffull;
  return (eight | eight >> 16) & 0xffffffffull;
}

// Of every eight bytes the even ones, then the odd ones.
inline void even_first(int8_t* bytes, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t eight;
    memcpy(&eight, bytes + i, 8);
    eight = even_bytes(eight) | even_bytes(eight >> 8) << 32;
    memcpy(bytes + i, &eight, 8);
  }
}

void tile_round(const float* x, int64_t n_in, int bits, int64_t block, void* out) {
  const Token token(out, n_in, block);
  const int zero = bits == 4 ? 8 : kByteZero;
  for (int64_t b = 0; b < n_in / block; ++b) {
    const float* from = x + b * block;
    const float step = step_of(from, block);
    int32_t sum = 0;
    for (int64_t i = 0; i < block; i += kRounded) {
      int8_t rounded[kRounded];
      const int64_t n = block - i < kRounded ? block - i : kRounded;
      round_values(from + i, n, step, rounded);
      for (int64_t j = 0; j < n; ++j) sum += rounded[j];
      if (bits == 4) even_first(rounded, n);
      memcpy(token.bytes + b * block + i, rounded, size_t(n));
    }
    token.scales[b] = step;
    token.corrections[b] = -zero * sum;
  }
}

int64_t tile_bytes(int64_t n_in, int64_t block) {
  return kTileRows * (n_in + n_in / block * int64_t(sizeof(float)));
}

// Rows [begin, begin + rows) as vectors of weights, then the scales of each block; rows that are
// missing in the last tile are copies of its last.
void tile_unpack(const uint8_t* packed, const float* scales, int64_t n_in, int bits, int64_t block,
                 int64_t begin, int rows, uint8_t* out) {
  const int64_t row_bytes = n_in * bits / 8, blocks = n_in / block;
  const auto row = [&](int r) { return begin + (r < rows ? r : rows - 1); };
  for (int64_t at = 0; at < row_bytes; at += kBytes) {
    for (int v = 0; v < kTileVectors; ++v) {
      Ints fours[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const uint8_t* from = packed + row(v * kWidth + i) * row_bytes + at;
        __builtin_prefetch(from + kTileAhead);
        fours[i] = load_ints(from);
      }
      transpose(fours);
      uint8_t* to = out + v * kBytes;
      for (const Ints& four : fours) {
        save_ints(to, bits == 4 ? low_nibbles(four) : as_byte_weights(four));
        to += kTileVectors * kBytes;
        if (bits == 8) continue;
        save_ints(to, high_nibbles(four));
        to += kTileVectors * kBytes;
      }
    }
    out += kTileRows * kBytes * (8 / bits);
  }
  float* to = (float*)out;
  for (int64_t b = 0; b < blocks; ++b)
    for (int r = 0; r < kTileRows; ++r) *to++ = scales[row(r) * blocks + b];
}

template <int bits, int tokens, int g = 0>
inline void add_run(const Ints (&runs)[tokens], const uint8_t* tile,
                    Ints (&dots)[tokens][kTileVectors]) {
  if constexpr (g < kRun) {
    Ints weights[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v)
      weights[v] = load_ints(tile + (g * kTileVectors + v) * kBytes);
    for (int t = 0; t < tokens; ++t)
      for (int v = 0; v < kTileVectors; ++v)
        dots[t][v] = add_group<bits, g>(dots[t][v], weights[v], runs[t]);
    add_run<bits, tokens, g + 1>(runs, tile, dots);
  }
}

template <int bits, int tokens>
inline void tile_block(const uint8_t* x, const uint8_t* tile, int64_t n_in, int64_t block,
                       float* out, int64_t stride) {
  const float* tile_scales = (const float*)(tile + kTileRows * n_in);
  const int64_t token_bytes = tile_token_bytes(n_in, block);
  Vec sums[tokens][kTileVectors];
  for (auto& row : sums)
    for (Vec& sum : row) sum = splat(0.0f);
  for (int64_t b = 0; b < n_in / block; ++b, tile_scales += kTileRows) {
    const int8_t* bytes[tokens];
    Ints dots[tokens][kTileVectors];
    for (int t = 0; t < tokens; ++t) {
      const Token token((void*)(x + t * token_bytes), n_in, block);
      bytes[t] = token.bytes + b * block;
      for (Ints& dot : dots[t]) dot = splat_ints(token.corrections[b]);
    }
    for (int64_t i = 0; i < block; i += 4 * kRun, tile += kRun * kTileVectors * kBytes) {
      Ints runs[tokens];
      for (int t = 0; t < tokens; ++t) runs[t] = load_run(bytes[t] + i);
      add_run<bits, tokens>(runs, tile, dots);
    }
    for (int t = 0; t < tokens; ++t) {
      const Vec step = splat(Token((void*)(x + t * token_bytes), n_in, block).scales[b]);
      for (int v = 0; v < kTileVectors; ++v)
        sums[t][v] = multiply_add(to_float(dots[t][v]), mul(step, load(tile_scales + v * kWidth)),
                                  sums[t][v]);
    }
  }
  for (int t = 0; t < tokens; ++t)
    for (int v = 0; v < kTileVectors; ++v) save(out + t * stride + v * kWidth, sums[t][v]);
}

// All tokens with an unpacked tile: `rows` columns of `out`, whose rows are `stride` apart.
template <int bits>
void tile_tokens(const uint8_t* x, int64_t tokens, const uint8_t* tile, int64_t n_in, int64_t block,
                 int rows, float* out, int64_t stride) {
  const int64_t token_bytes = tile_token_bytes(n_in, block);
  float whole[kTileTokens * kTileRows];
  for (int64_t t = 0; t < tokens;) {
    const int n = tokens - t >= kTileTokens ? kTileTokens : 1;
    const bool part = rows < kTileRows;
    float* to = part ? whole : out + t * stride;
    const int64_t apart = part ? kTileRows : stride;
    (n == 1 ? tile_block<bits, 1> : tile_block<bits, kTileTokens>)(x + t * token_bytes, tile, n_in,
                                                                   block, to, apart);
    for (int i = 0; part && i < n; ++i)
      memcpy(out + (t + i) * stride, whole + i * kTileRows, sizeof(float) * size_t(rows));
    t += n;
  }
}

void tile_dense(const uint8_t* x, int64_t tokens, const uint8_t* packed, const float* scales,
                int64_t n_out, int64_t n_in, int bits, int64_t block, int64_t begin,
                uint8_t* memory, float* out) {
  const int rows = int(n_out - begin < kTileRows ? n_out - begin : kTileRows);
  tile_unpack(packed, scales, n_in, bits, block, begin, rows, memory);
  (bits == 4 ? tile_tokens<4> : tile_tokens<8>)(x, tokens, memory, n_in, block, rows, out + begin,
                                                n_out);
}

}  // namespace
}  // namespace edge_kv
