// Attention over int8 rows in products of bytes, for CPUs that add four of them at once (VNNI); part
// of kernels.cpp, between what it needs there.
//
// A tile of rows is put in order once and then meets all queries: a row is read once however many
// they are. Queries and weights are two digits each, a coarse and a fine byte. Most tiles of a long
// context meet only the coarse ones, which halves the work: those in which no key takes more than
// 1/64 of a query's softmax so far. What rounding does to their keys is below what storing the rows in
// 8 bits did, and averages out over the many keys that share the rest.
#pragma once

constexpr int kStepValues = 128;     // values of a query that share a step
constexpr int kMostSteps = kMostDim / kStepValues;
constexpr float kCoarseShare = 1.0f / 64;

using ByteVec = __m512i;

// Keys plus 128: a vector holds four bytes of each of 16 keys, [keys / 32] [dim / 4] [2].
inline void order_keys(const int8_t* const* keys, int n, int dim, char* to) {
  const ByteVec flip = _mm512_set1_epi8(-128);
  for (int j = 0; j < n; j += kWidth) {
    char* const block = to + (j / 32) * int64_t(32) * dim + (j / kWidth % 2) * kLine;
    for (int d = 0; d < dim; d += 16) {
      ByteVec r[4], t[4];  // sixteen bytes of keys i, 4 + i, 8 + i, 12 + i
      for (int i = 0; i < 4; ++i) {
        const auto piece = [&](int key) {
          return _mm_loadu_si128((const __m128i*)(keys[j + i + key] + d));
        };
        r[i] = _mm512_inserti32x4(_mm512_castsi128_si512(piece(0)), piece(4), 1);
        r[i] = _mm512_inserti32x4(_mm512_inserti32x4(r[i], piece(8), 2), piece(12), 3);
      }
      for (int i = 0; i < 4; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
      }
      r[0] = _mm512_unpacklo_epi64(t[0], t[2]);
      r[1] = _mm512_unpackhi_epi64(t[0], t[2]);
      r[2] = _mm512_unpacklo_epi64(t[1], t[3]);
      r[3] = _mm512_unpackhi_epi64(t[1], t[3]);
      for (int i = 0; i < 4; ++i)
        _mm512_store_si512(block + (d / 4 + i) * 2 * kLine, _mm512_xor_si512(r[i], flip));
    }
  }
}

// Values: a vector holds 16 values of each of four rows, [dim / 32] [rows / 4] [2].
inline void order_values(const int8_t* const* values, int n, int dim, char* to) {
  const ByteVec by_four = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const int64_t pair = int64_t(n) / 2 * kLine;  // bytes of 32 columns
  for (int d = 0; d < dim; d += kLine, to += 2 * pair)
    for (int j = 0; j < n; j += 4) {
      ByteVec r[4];
      for (int i = 0; i < 4; ++i)
        r[i] = _mm512_permutexvar_epi32(by_four, _mm512_loadu_si512(values[j + i] + d));
      const ByteVec a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
      const ByteVec c = _mm512_unpacklo_epi8(r[2], r[3]), e = _mm512_unpackhi_epi8(r[2], r[3]);
      char* const at = to + j / 2 * kLine;
      _mm512_store_si512(at, _mm512_unpacklo_epi16(a, c));
      _mm512_store_si512(at + kLine, _mm512_unpackhi_epi16(a, c));
      _mm512_store_si512(at + pair, _mm512_unpacklo_epi16(b, e));
      _mm512_store_si512(at + pair + kLine, _mm512_unpackhi_epi16(b, e));
    }
}

// Query rows in digits: a value is (256 * coarse + fine) * step.
struct ByteQueries {
  const int8_t* digits[2];      // coarse, fine: [rows, dim]
  const int32_t (*sums)[kMostSteps][2];  // of a step's coarse and fine digits, by row
  const float (*steps)[kMostSteps];
};

// Add products of two vectors of bytes with four bytes of each of R rows, `stride` apart: of keys,
// which are not negative, with digits of queries, or of values with weights. Four times, so that sums
// stay in registers.
template <int R, bool keys>
inline void add_bytes(ByteVec (&sums)[R][2], const char* lines, const void* fours, int64_t stride) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const ByteVec a = _mm512_load_si512(lines + 2 * i * kLine);
    const ByteVec b = _mm512_load_si512(lines + (2 * i + 1) * kLine);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const ByteVec x = _mm512_set1_epi32(four_bytes((const char*)fours + r * stride + 4 * i));
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], keys ? a : x, keys ? x : a);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], keys ? b : x, keys ? x : b);
    }
  }
}

// scores[r][j] = the coarse or the fine digits of query r with key j of a tile in order.
template <int R>
inline void byte_scores(const ByteQueries& q, int row, int which, int dim, const char* keys, int n,
                        float (*scores)[kTile], Ahead ahead) {
  const int8_t* const digits = q.digits[which] + int64_t(row) * dim;
  const float unit = which ? 1.0f : 256.0f;
  for (int j = 0; j < n; j += 32)
    for (int from = 0, step = 0; from < dim; from += kStepValues, ++step) {
      const int to = from + kStepValues < dim ? from + kStepValues : dim;
      ByteVec sums[R][2];
      for (int r = 0; r < R; ++r)
        sums[r][0] = sums[r][1] = _mm512_set1_epi32(-128 * q.sums[row + r][step][which]);
      for (int d = from; d < to; d += 16, keys += 8 * kLine) {
        ahead.fetch(8 * kLine);
        add_bytes<R, true>(sums, keys, digits + d, dim);
      }
      for (int r = 0; r < R; ++r) {
        const Vec by = splat(unit * q.steps[row + r][step]);
        float* const at = scores[r] + j;
        const Vec zero = splat(0.0f);
        save(at, multiply_add(_mm512_cvtepi32_ps(sums[r][0]), by, step ? load(at) : zero));
        save(at + kWidth,
             multiply_add(_mm512_cvtepi32_ps(sums[r][1]), by, step ? load(at + kWidth) : zero));
      }
    }
}

// mix[r] = keep * mix[r] + steps[r] * sum_j weights[r][j] * value j of a tile in order; weights have
// one digit or two, the higher one first.
template <int R>
inline void byte_mix(const uint8_t (*weights)[2][kTile], int digits, const float* steps,
                     const Softened* soft, const char* values, int n, int dim, float* mix,
                     Ahead ahead) {
  const int64_t lines = int64_t(n) / 2 * kLine;
  for (int d = 0; d < dim; d += 32, values += lines) {
    ByteVec sums[R][2];
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int g = 0; g < digits; ++g) {
      if (g)
        for (int r = 0; r < R; ++r)
          for (int i = 0; i < 2; ++i) sums[r][i] = _mm512_slli_epi32(sums[r][i], 8);
      const char* at = values;
      for (int j = 0; j < n; j += 16, at += 8 * kLine) {
        if (!g) ahead.fetch(8 * kLine);
        add_bytes<R, false>(sums, at, weights[0][g] + j, sizeof weights[0]);
      }
    }
    for (int r = 0; r < R; ++r) {
      float* const to = mix + r * dim + d;
      const Vec step = splat(steps[r]), k = splat(soft[r].keep);
      save(to, multiply_add(_mm512_cvtepi32_ps(sums[r][0]), step, mul(load(to), k)));
      save(to + kWidth,
           multiply_add(_mm512_cvtepi32_ps(sums[r][1]), step, mul(load(to + kWidth), k)));
    }
  }
}

// Round n weights of at most `size`, a multiple of kWidth and not negative, to steps: 255 of them are
// `size` in one digit, 65535 in two. Returns the step.
inline float weight_digits(const float* x, int n, float size, int digits, uint8_t (*to)[kTile]) {
  const float step = (size > 1e-30f ? size : 1e-30f) / (digits == 1 ? 255.0f : 65535.0f);
  const Vec per_step = splat(1.0f / step);
  for (int i = 0; i < n; i += kWidth) {
    const __m512i whole = _mm512_cvtps_epu32(mul(load(x + i), per_step));
    const __m512i high = digits == 1 ? whole : _mm512_srli_epi32(whole, 8);
    _mm_storeu_si128((__m128i*)(to[0] + i), _mm512_cvtusepi32_epi8(high));
    if (digits > 1) _mm_storeu_si128((__m128i*)(to[1] + i), _mm512_cvtepi32_epi8(whole));
  }
  return step;
}

// A query row in digits.
inline void query_digits(const float* x, int dim, int8_t* coarse, int8_t* fine,
                         int32_t (*sums)[2], float* steps) {
  for (int from = 0, at = 0; from < dim; from += kStepValues, ++at) {
    const int to = from + kStepValues < dim ? from + kStepValues : dim;
    const float size = size_of(x + from, to - from);
    steps[at] = (size > 1e-30f ? size : 1e-30f) / kLargest;
    const Vec per_step = splat(1.0f / steps[at]);
    __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;
    for (int i = from; i < to; i += kWidth) {
      const __m512i whole = _mm512_cvtps_epi32(mul(load(x + i), per_step));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
      const __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8));
      const __m128i high_bytes = _mm512_cvtepi32_epi8(high), low_bytes = _mm512_cvtepi32_epi8(low);
      _mm_storeu_si128((__m128i*)(coarse + i), high_bytes);
      _mm_storeu_si128((__m128i*)(fine + i), low_bytes);
      // Of the bytes: where a value is no number they are not the digits.
      high_sum = _mm512_add_epi32(high_sum, _mm512_cvtepi8_epi32(high_bytes));
      low_sum = _mm512_add_epi32(low_sum, _mm512_cvtepi8_epi32(low_bytes));
    }
    sums[at][0] = _mm512_reduce_add_epi32(high_sum);
    sums[at][1] = _mm512_reduce_add_epi32(low_sum);
  }
}

// Whether a key takes more than kCoarseShare of the softmax of a row: the one of the score `peak`.
inline bool stands_out(float peak, float top, float sum) {
  const float least = sum * kCoarseShare;
  if (peak <= top && least >= 1.0f) return false;
  return !(sum > 0.0f && peak <= top + logf(least));
}

void attend_tiles(const Cache& cache, const Queries& q, int64_t begin, int64_t end,
                  const Partial& out) {
  const int dim = cache.dim, most = rows_held(cache);
  alignas(64) int8_t digits[2][kQueryValues];
  alignas(64) char key_tile[kTile * kMostDim], value_tile[kTile * kMostDim];
  int32_t sums[kQueryRows][kMostSteps][2];
  float query_steps[kQueryRows][kMostSteps];
  const ByteQueries queries{{digits[0], digits[1]}, sums, query_steps};
  TileScales scales;
  const auto open = [&](int head, const Tile& tile) {
    order_tile(
        head_of(cache, head, 1), tile, scales,
        [&](const int8_t* const* rows, int n) { order_keys(rows, n, dim, key_tile); },
        [&](const int8_t* const* rows, int n) { order_values(rows, n, dim, value_tile); });
  };
  for (int from = 0; from < q.count; from += most) {
    const int count = q.count - from < most ? q.count - from : most;
    for (int head = 0; head < cache.heads; ++head)
      for (int r = 0; r < count; ++r) {
        const int row = head * count + r;
        query_digits(q.rows + head * q.next + int64_t(from + r) * dim, dim,
                     digits[0] + int64_t(row) * dim, digits[1] + int64_t(row) * dim, sums[row],
                     query_steps[row]);
      }
    walk<kDotRows>(cache, begin, end, count, open, [&](auto block, int head, int at,
                                                       const Tile& tile) {
      constexpr int R = decltype(block)::count;
      const int first = from + at, n = rounded_up(tile.count), row = head * count + at;
      if (!sees(q, first, R, tile)) return;
      const Cache one = head_of(cache, head, 1);
      const Partial partial = head_of(out, head);
      const bool edge = at_edge<R>(q, first, tile);
      alignas(64) float scores[R][kTile], peaks[R];
      alignas(64) uint8_t weights[R][2][kTile];
      float steps[R];
      Softened soft[R];
      const auto scaled = [&](int r, float* of, const float* sum) {
        const float peak = scale_scores(of, scales.keys, 1.0f, n, sum);
        if (!edge) return peak;
        mask_scores(q, first + r, tile, of);
        return peak_of(of, n);
      };
      byte_scores<R>(queries, row, 0, dim, key_tile, n, scores,
                     after(one, tile, one.keys, at, R, count));
      bool fine = false;
      for (int r = 0; r < R; ++r) {
        peaks[r] = scaled(r, scores[r], nullptr);
        fine |= stands_out(peaks[r], partial.top[first + r], partial.sum[first + r]);
      }
      if (fine) {
        alignas(64) float more[R][kTile];
        byte_scores<R>(queries, row, 1, dim, key_tile, n, more, Ahead{});
        for (int r = 0; r < R; ++r) {
          peaks[r] = scaled(r, more[r], scores[r]);
          memcpy(scores[r], more[r], sizeof scores[r]);
        }
      }
      const int digits = fine ? 2 : 1;
      for (int r = 0; r < R; ++r) {
        soft[r] = soften(scores[r], n, peaks[r], scales.values, partial.top + first + r,
                         partial.sum + first + r);
        steps[r] = weight_digits(scores[r], n, soft[r].largest, digits, weights[r]);
      }
      byte_mix<R>(weights, digits, steps, soft, value_tile, n, dim,
                  partial.mix + int64_t(first) * dim, after(one, tile, one.values, at, R, count));
    });
  }
}
