// Attention over int8 rows in products of bytes, for CPUs that add four of them at once (VNNI); part
// of kernels.cpp, between what it needs there.
//
// A tile of rows is put in order once and then meets all queries: a row is read once however many
// they are. Queries and weights are two digits each, a coarse and a fine byte. Most tiles of a long
// context meet only the coarse ones, which halves the work: those in which no key takes more than
// 1/64 of a query's softmax so far. What rounding does to their keys is below what storing the rows in
// 8 bits did, and averages out over the many keys that share the rest.
#pragma once

constexpr int kByteQueries = 8;      // query rows of a head; fewer are not worth the order
constexpr int kByteDim = 1024;       // most values of a row
constexpr int kStepValues = 128;     // values of a query that share a step
constexpr int kMostSteps = kByteDim / kStepValues;
constexpr float kCoarseShare = 1.0f / 64;
constexpr int kLine = 64;  // bytes of a vector

using ByteVec = __m512i;

// A tile's keys plus 128: a vector holds four bytes of each of 16 keys, [keys / 32] [dim / 4] [2].
// The last key is repeated.
inline void order_keys(const int8_t* keys, int64_t stride, int n, int dim, char* to) {
  const ByteVec flip = _mm512_set1_epi8(-128);
  for (int j = 0; j < n; j += kWidth) {
    char* const block = to + (j / 32) * int64_t(32) * dim + (j / kWidth % 2) * kLine;
    for (int d = 0; d < dim; d += kLine) {
      ByteVec r[16], t[16];
      for (int i = 0; i < 16; ++i)
        r[i] = _mm512_loadu_si512(keys + (j + i < n ? j + i : n - 1) * stride + d);
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
      for (int c = 0; c < 4; ++c) {
        const ByteVec a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        const ByteVec b = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        const ByteVec e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const ByteVec f = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(a, e, 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(b, f, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(a, e, 0xdd);
        t[12 + c] = _mm512_shuffle_i32x4(b, f, 0xdd);
      }
      for (int i = 0; i < 16; ++i)
        _mm512_store_si512(block + (d / 4 + i) * 2 * kLine, _mm512_xor_si512(t[i], flip));
    }
  }
}

// A tile's values: a vector holds 16 values of each of four rows, [dim / 32] [rows / 4] [2]. The last
// row is repeated.
inline void order_values(const int8_t* values, int64_t stride, int n, int dim, char* to) {
  const ByteVec by_four = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const int fours = (n + 3) / 4;
  for (int d = 0; d < dim; d += kLine)
    for (int j = 0; j < fours; ++j) {
      ByteVec r[4];
      for (int i = 0; i < 4; ++i)
        r[i] = _mm512_permutexvar_epi32(
            by_four,
            _mm512_loadu_si512(values + (4 * j + i < n ? 4 * j + i : n - 1) * stride + d));
      const ByteVec a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
      const ByteVec c = _mm512_unpacklo_epi8(r[2], r[3]), e = _mm512_unpackhi_epi8(r[2], r[3]);
      const ByteVec all[] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c),
                             _mm512_unpacklo_epi16(b, e), _mm512_unpackhi_epi16(b, e)};
      for (int i = 0; i < 4; ++i)
        _mm512_store_si512(
            to + ((int64_t(d / 32 + i / 2) * fours + j) * 2 + i % 2) * kLine, all[i]);
    }
}

// Query rows in digits: a value is (256 * coarse + fine) * step.
struct ByteQueries {
  const int8_t* digits[2];      // coarse, fine: [rows, dim]
  const int32_t (*sums)[kMostSteps][2];  // of a step's coarse and fine digits, by row
  const float (*steps)[kMostSteps];
};

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
      for (int d = from; d < to; d += 4, keys += 2 * kLine) {
        ahead.fetch(64), ahead.fetch(64);
        const ByteVec a = _mm512_load_si512(keys), b = _mm512_load_si512(keys + kLine);
        for (int r = 0; r < R; ++r) {
          const ByteVec x = _mm512_set1_epi32(four_bytes(digits + r * dim + d));
          sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], a, x);
          sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], b, x);
        }
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

// mix[r] = keep[r] * mix[r] + steps[r] * sum_j weights[r][j] * value j of a tile in order; weights
// have one digit or two, the higher one first.
template <int R>
inline void byte_mix(const uint8_t (*weights)[2][kTile], int digits, const float* steps,
                     const float* keep, const char* values, int n, int dim, float* mix,
                     Ahead ahead) {
  const int64_t lines = (n + 3) / 4 * int64_t(2) * kLine;
  for (int d = 0; d < dim; d += 32, values += lines) {
    ByteVec sums[R][2];
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int g = 0; g < digits; ++g) {
      if (g)
        for (int r = 0; r < R; ++r)
          for (int i = 0; i < 2; ++i) sums[r][i] = _mm512_slli_epi32(sums[r][i], 8);
      const char* at = values;
      for (int j = 0; j < n; j += 4, at += 2 * kLine) {
        if (!g) ahead.fetch(64), ahead.fetch(64);
        const ByteVec a = _mm512_load_si512(at), b = _mm512_load_si512(at + kLine);
        for (int r = 0; r < R; ++r) {
          const ByteVec w = _mm512_set1_epi32(four_bytes(weights[r][g] + j));
          sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], w, a);
          sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], w, b);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      float* const to = mix + r * dim + d;
      const Vec step = splat(steps[r]), k = splat(keep[r]);
      save(to, multiply_add(_mm512_cvtepi32_ps(sums[r][0]), step, mul(load(to), k)));
      save(to + kWidth,
           multiply_add(_mm512_cvtepi32_ps(sums[r][1]), step, mul(load(to + kWidth), k)));
    }
  }
}

// Round n weights, a multiple of kWidth and not negative, to steps of the largest: 255 in one digit,
// 65535 in two. Returns the step.
inline float weight_digits(const float* x, int n, int digits, uint8_t (*to)[kTile]) {
  Vec top = splat(1e-30f);
  for (int i = 0; i < n; i += kWidth) top = larger(top, load(x + i));
  const float step = largest(top) / (digits == 1 ? 255.0f : 65535.0f);
  const Vec per_step = splat(1.0f / step);
  for (int i = 0; i < n; i += kWidth) {
    const __m512i whole = _mm512_cvtps_epu32(mul(load(x + i), per_step));
    const __m512i high = digits == 1 ? whole : _mm512_srli_epi32(whole, 8);
    _mm_storeu_si128((__m128i*)(to[0] + i), _mm512_cvtusepi32_epi8(high));
    _mm_storeu_si128((__m128i*)(to[1] + i), _mm512_cvtepi32_epi8(whole));
  }
  return step;
}

// A query row in digits.
inline void query_digits(const float* x, int dim, int8_t* coarse, int8_t* fine,
                         int32_t (*sums)[2], float* steps) {
  for (int from = 0, at = 0; from < dim; from += kStepValues, ++at) {
    const int to = from + kStepValues < dim ? from + kStepValues : dim;
    Vec top = splat(1e-30f);
    for (int i = from; i < to; i += kWidth) {
      const Vec v = load(x + i);
      top = larger(top, larger(v, sub(splat(0.0f), v)));
    }
    steps[at] = largest(top) / kLargest;
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

// Whether a key of the tile takes more than kCoarseShare of the softmax of any of R rows.
template <int R>
inline bool stands_out(const float (*scores)[kTile], int n, const float* top, const float* sum) {
  for (int r = 0; r < R; ++r) {
    if (!(sum[r] > 0.0f)) return true;
    const Vec bound = splat(top[r] + logf(sum[r] * kCoarseShare));
    __mmask16 above = 0;
    int j = 0;
    for (; j + kWidth <= n; j += kWidth)
      above |= _mm512_cmp_ps_mask(load(scores[r] + j), bound, _CMP_NLE_UQ);
    if (j < n)
      above |= _mm512_mask_cmp_ps_mask(__mmask16((1u << (n - j)) - 1), load(scores[r] + j), bound,
                                       _CMP_NLE_UQ);
    if (above) return true;
  }
  return false;
}

void attend_bytes(const Cache& cache, const Queries& q, int64_t begin, int64_t end,
                  const Partial& out) {
  const int dim = cache.dim, most = rows_held(cache);
  alignas(64) int8_t digits[2][kQueryValues];
  alignas(64) char key_tile[kTile * kByteDim], value_tile[kTile * kByteDim];
  int32_t sums[kQueryRows][kMostSteps][2];
  float query_steps[kQueryRows][kMostSteps];
  const ByteQueries queries{{digits[0], digits[1]}, sums, query_steps};
  float ones[kDotRows];
  for (float& one : ones) one = 1.0f;
  for (int from = 0; from < q.count; from += most) {
    const int count = q.count - from < most ? q.count - from : most;
    for (int head = 0; head < cache.heads; ++head)
      for (int r = 0; r < count; ++r) {
        const int row = head * count + r;
        query_digits(q.rows + head * q.next + int64_t(from + r) * dim, dim,
                     digits[0] + int64_t(row) * dim, digits[1] + int64_t(row) * dim, sums[row],
                     query_steps[row]);
      }
    int64_t ordered = -1;  // the first row, and the head, of the tile that is in order
    int ordered_head = 0;
    walk<kDotRows>(cache, begin, end, count, [&](auto block, int head, int at, const Tile& tile) {
      constexpr int R = decltype(block)::count;
      const int first = from + at, n = tile.count, row = head * count + at;
      if (!sees(q, first, R, tile)) return;
      const Cache one = head_of(cache, head, 1);
      const Partial partial = head_of(out, head);
      alignas(64) float scores[R][kTile];
      alignas(64) uint8_t weights[R][2][kTile];
      float steps[R], keep[R];
      const int64_t stride = one.row_stride;
      const bool fresh = ordered != tile.first || ordered_head != head;
      if (fresh) {
        order_keys(static_cast<const int8_t*>(one.keys) + tile.slot * stride, stride, n, dim,
                   key_tile);
        ordered = tile.first, ordered_head = head;
      }
      byte_scores<R>(queries, row, 0, dim, key_tile, n, scores, after(one, tile, one.keys, fresh));
      scale_scores<R>(one, tile, ones, scores);
      mask_scores<R>(q, first, tile, scores);
      const bool fine = stands_out<R>(scores, n, partial.top + first, partial.sum + first);
      if (fine) {
        alignas(64) float more[R][kTile];
        byte_scores<R>(queries, row, 1, dim, key_tile, n, more, Ahead{nullptr, 0, dim});
        scale_scores<R>(one, tile, ones, more);
        for (int r = 0; r < R; ++r)  // what is masked stays so
          for (int j = 0; j < n; ++j) scores[r][j] += more[r][j];
      }
      soften_scores<R>(one, first, tile, scores, keep, partial);
      const int padded = (n + kWidth - 1) / kWidth * kWidth;
      for (int r = 0; r < R; ++r) {
        for (int i = n; i < padded; ++i) scores[r][i] = 0.0f;
        steps[r] = weight_digits(scores[r], padded, fine ? 2 : 1, weights[r]);
      }
      if (fresh)
        order_values(static_cast<const int8_t*>(one.values) + tile.slot * stride, stride, n, dim,
                     value_tile);
      byte_mix<R>(weights, fine ? 2 : 1, steps, keep, value_tile, n, dim,
                  partial.mix + int64_t(first) * dim, after(one, tile, one.values, fresh));
    });
  }
}
