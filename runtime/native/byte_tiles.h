// Attention over int8 rows in products of bytes, for CPUs that add four of them at once (VNNI); part
// of kernels.cpp, between what it needs there.
//
// A tile of rows meets all queries before the next one does: a row is read once however many they are.
// Many queries meet tiles that were put in order once, few meet the rows where they lie, which
// costs more for each query and nothing besides. Queries and weights are two digits each, a coarse
// and a fine byte. A query meets most tiles of a long context with the coarse ones only, which halves
// the work: those in which no key takes more than 1/64 of its softmax so far. What rounding does to
// their keys is below what storing the rows in 8 bits did, and averages out over the many keys that
// share the rest.
#pragma once

constexpr int kStepValues = 128;     // values of a query that share a step
constexpr int kMostSteps = kMostDim / kStepValues;
constexpr float kCoarseShare = 1.0f / 64;
constexpr int kDigitQueries = 4;     // of a head; with fewer, memory is slower than digits of 16 bits
constexpr int kFewQueries = 16;      // for which tiles are not worth their order
constexpr int kWideRow = 256;        // values, so that the sums of a row are little beside its products

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
      ahead.fetch(32 * (to - from));
      for (int d = from; d < to; d += 16, keys += 8 * kLine)
        add_bytes<R, true>(sums, keys, digits + d, dim);
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

// 32 columns of R rows of sums, `dim` apart, take in what a tile adds.
template <int R>
inline void add_mixed(const ByteVec (&sums)[R][2], const float* steps, const Softened* soft, float* mix,
                      int dim) {
  for (int r = 0; r < R; ++r) {
    float* const to = mix + r * dim;
    const Vec step = splat(steps[r]), k = splat(soft[r].keep);
    save(to, multiply_add(_mm512_cvtepi32_ps(sums[r][0]), step, mul(load(to), k)));
    save(to + kWidth,
         multiply_add(_mm512_cvtepi32_ps(sums[r][1]), step, mul(load(to + kWidth), k)));
  }
}

// mix[r] = keep * mix[r] + steps[r] * sum_j weights[r][j] * value j of a tile in order.
template <int R>
inline void byte_mix(const uint8_t (*weights)[kTile], const float* steps, const Softened* soft,
                     const char* values, int n, int dim, float* mix, Ahead ahead) {
  const int64_t lines = int64_t(n) / 2 * kLine;
  for (int d = 0; d < dim; d += 32, values += lines) {
    ByteVec sums[R][2];
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    ahead.fetch(32 * n);
    const char* at = values;
    for (int j = 0; j < n; j += 16, at += 8 * kLine)
      add_bytes<R, false>(sums, at, weights[0] + j, kTile);
    add_mixed<R>(sums, steps, soft, mix + d, dim);
  }
}

// Round n weights of at most `size`, a multiple of kWidth and not negative, to steps: 255 of them are
// `size` in one digit, 65535 in two. Returns the step of the first digit; that of a second one is
// 1/256 of it.
inline float weight_digits(const float* x, int n, float size, uint8_t* first, uint8_t* second) {
  const float step = (size > 1e-30f ? size : 1e-30f) / (second ? 65535.0f : 255.0f);
  const Vec per_step = splat(1.0f / step);
  for (int i = 0; i < n; i += kWidth) {
    const __m512i whole = _mm512_cvtps_epu32(mul(load(x + i), per_step));
    const __m512i high = second ? _mm512_srli_epi32(whole, 8) : whole;
    _mm_storeu_si128((__m128i*)(first + i), _mm512_cvtusepi32_epi8(high));
    if (second) _mm_storeu_si128((__m128i*)(second + i), _mm512_cvtepi32_epi8(whole));
  }
  return second ? 256.0f * step : step;
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

// Tiles that are put in order for many queries. The values of a query take steps of their own by
// kStepValues.
class OrderedTiles {
 public:
  OrderedTiles(int dim, int) : dim_(dim) {}

  void take_query(int row, const float* x) {
    const int64_t at = int64_t(row) * dim_;
    query_digits(x, dim_, digits_[0] + at, digits_[1] + at, sums_[row], steps_[row]);
  }

  void open(const Cache& one, const Tile& tile, TileScales& scales) {
    order_tile(
        one, tile, scales,
        [&](const int8_t* const* rows, int n) { order_keys(rows, n, dim_, keys_); },
        [&](const int8_t* const* rows, int n) { order_values(rows, n, dim_, values_); });
  }

  template <int R>
  void scores(int row, int which, int n, float (*to)[kTile], Ahead ahead) const {
    const ByteQueries queries{{digits_[0], digits_[1]}, sums_, steps_};
    byte_scores<R>(queries, row, which, dim_, keys_, n, to, ahead);
  }

  template <int R>
  void mix(const uint8_t (*weights)[kTile], const float* steps, const Softened* soft, int n,
           float* to, Ahead ahead) const {
    byte_mix<R>(weights, steps, soft, values_, n, dim_, to, ahead);
  }

 private:
  int dim_;
  alignas(64) int8_t digits_[2][kQueryValues];
  alignas(64) char keys_[kTile * kMostDim];
  alignas(64) char values_[kTile * kMostDim];
  int32_t sums_[kQueryRows][kMostSteps][2];
  float steps_[kQueryRows][kMostSteps];
};

// Add products of lines of two keys, which are not negative, with those of R queries: `of_line` bytes
// from one line of the queries to the next.
template <int R, int lines>
inline void add_lines(ByteVec (&sums)[R][2], const int8_t* one, const int8_t* two,
                      const int8_t* queries, int64_t of_line) {
  const ByteVec flip = _mm512_set1_epi8(-128);
#pragma GCC unroll 4
  for (int i = 0; i < lines; ++i, queries += of_line) {
    const ByteVec a = _mm512_xor_si512(_mm512_loadu_si512(one + i * kLine), flip);
    const ByteVec b = _mm512_xor_si512(_mm512_loadu_si512(two + i * kLine), flip);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      ByteVec x = _mm512_load_si512(queries + r * kLine);
      __asm__("" : "+v"(x));  // loaded once, not for both products
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], a, x);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], b, x);
    }
  }
}

// Add products of sixteen rows with the weights of R queries, `stride` apart: of the lower or the
// upper eight of every sixteen of their columns [d, d + kLine), four of eight in each of two sums.
template <int R, bool upper>
inline void add_rows(ByteVec (&sums)[R][2], const int8_t* const* rows, int d,
                     const uint8_t* weights, int stride) {
  const auto pair = [&](int j) {
    const ByteVec a = _mm512_loadu_si512(rows[j] + d), b = _mm512_loadu_si512(rows[j + 1] + d);
    return upper ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
  };
#pragma GCC unroll 4
  for (int j = 0; j < 16; j += 4) {
    const ByteVec a = pair(j), b = pair(j + 2);
    const ByteVec v[2] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const ByteVec w = _mm512_set1_epi32(four_bytes(weights + r * stride + j));
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], w, v[0]);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], w, v[1]);
    }
  }
}

// What those sums add to the mix of a row, of the first of the columns: eight of sixteen at a time.
inline void add_eights(const ByteVec (&sums)[2], float step, float keep, float* mix) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int i = 0; i < 2; ++i, mix += 32) {
    const __m512i both = _mm512_permutex2var_epi32(sums[0], i ? second : first, sums[1]);
    const Vec old = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(mix)),
                                       _mm256_loadu_ps(mix + 16), 1);
    const Vec all = multiply_add(_mm512_cvtepi32_ps(both), splat(step), mul(old, splat(keep)));
    _mm256_storeu_ps(mix, _mm512_castps512_ps256(all));
    _mm256_storeu_ps(mix + 16, _mm512_extractf32x8_ps(all, 1));
  }
}

// Rows where they lie, for few queries. A line is 64 values of a row; the values of a query in one
// lane of its lines take steps of their own.
class RowsInPlace {
 public:
  RowsInPlace(int dim, int queries) : dim_(dim), of_line_(int64_t(queries) * kLine) {}

  void take_query(int row, const float* x) {
    alignas(64) float size[kLine] = {}, per_step[kLine];
    for (int d = 0; d < dim_; d += kWidth) {
      const Vec v = load(x + d);
      float* const at = size + d % kLine;
      save(at, larger(load(at), larger(v, sub(splat(0.0f), v))));
    }
    for (int lane = 0; lane < kWidth; ++lane) {
      float most = 1e-30f;
      for (int i = 4 * lane; i < 4 * lane + 4; ++i) most = size[i] > most ? size[i] : most;
      steps_[row][lane] = most / kLargest;
      for (int i = 4 * lane; i < 4 * lane + 4; ++i) per_step[i] = kLargest / most;
    }
    ByteVec sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int d = 0; d < dim_; d += kLine) {
      int8_t* const at[2] = {line(row, 0, d), line(row, 1, d)};
      for (int i = 0; i < kLine; i += kWidth) {
        const __m512i whole = _mm512_cvtps_epi32(mul(load(x + d + i), load(per_step + i)));
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
        const __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8));
        _mm_store_si128((__m128i*)(at[0] + i), _mm512_cvtepi32_epi8(high));
        _mm_store_si128((__m128i*)(at[1] + i), _mm512_cvtepi32_epi8(low));
      }
      for (int which = 0; which < 2; ++which)
        sums[which] = _mm512_dpbusd_epi32(sums[which], _mm512_set1_epi8(1),
                                          _mm512_load_si512(at[which]));
    }
    for (int which = 0; which < 2; ++which)
      _mm512_store_si512(starts_[row][which], _mm512_sub_epi32(_mm512_setzero_si512(),
                                                               _mm512_slli_epi32(sums[which], 7)));
  }

  void open(const Cache& one, const Tile& tile, TileScales& scales) {
    scales.read(one, tile);
    find_rows(one.keys, one.row_stride, tile, keys_);
    find_rows(one.values, one.row_stride, tile, values_);
  }

  // Keys plus 128 are not negative; what that adds is in the start values.
  template <int R>
  void scores(int row, int which, int n, float (*to)[kTile], Ahead ahead) const {
    Vec steps[R];
    for (int r = 0; r < R; ++r) steps[r] = mul(load(steps_[row + r]), splat(which ? 1.0f : 256.0f));
    for (int j = 0; j < n; j += 2) {
      ahead.fetch(2 * dim_);
      ByteVec sums[R][2];
      for (int r = 0; r < R; ++r)
        sums[r][0] = sums[r][1] = _mm512_load_si512(starts_[row + r][which]);
      int d = 0;
      for (; d + 4 * kLine <= dim_; d += 4 * kLine)
        add_lines<R, 4>(sums, keys_[j] + d, keys_[j + 1] + d, line(row, which, d), of_line_);
      for (; d < dim_; d += kLine)
        add_lines<R, 1>(sums, keys_[j] + d, keys_[j + 1] + d, line(row, which, d), of_line_);
      const auto floats = [&](int r, int key) {
        return mul(_mm512_cvtepi32_ps(sums[r][key]), steps[r]);
      };
#pragma GCC unroll 8
      for (int r = 0; r < R; r += 2) {
        const int next = r + 1 < R ? r + 1 : r;
        save_totals(floats(r, 0), floats(r, 1), floats(next, 0), floats(next, 1), to[r] + j,
                    to[next] + j);
      }
    }
  }

  template <int R>
  void mix(const uint8_t (*weights)[kTile], const float* steps, const Softened* soft, int n,
           float* to, Ahead ahead) const {
    for (int d = 0; d < dim_; d += kLine) {
      mix_eights<R, false>(weights, steps, soft, n, d, to + d, ahead);
      mix_eights<R, true>(weights, steps, soft, n, d, to + d + 8, ahead);
    }
  }

 private:
  template <int R, bool upper>
  void mix_eights(const uint8_t (*weights)[kTile], const float* steps, const Softened* soft, int n,
                  int d, float* to, Ahead& ahead) const {
    ByteVec sums[R][2];
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int j = 0; j < n; j += 16) {
      ahead.fetch(16 * 32);
      add_rows<R, upper>(sums, values_ + j, d, weights[0] + j, kTile);
    }
    for (int r = 0; r < R; ++r) add_eights(sums[r], steps[r], soft[r].keep, to + r * dim_);
  }

  int8_t* line(int row, int which, int d) {
    return digits_[which] + d / kLine * of_line_ + row * kLine;
  }
  const int8_t* line(int row, int which, int d) const {
    return digits_[which] + d / kLine * of_line_ + row * kLine;
  }

  int dim_;
  int64_t of_line_;  // bytes of a line of all queries
  alignas(64) int8_t digits_[2][kQueryValues];
  alignas(64) int32_t starts_[kQueryRows][2][kWidth];
  alignas(64) float steps_[kQueryRows][kWidth];
  const int8_t* keys_[kTile];
  const int8_t* values_[kTile];
};

template <class Rows>
void attend_bytes(const Cache& cache, const Queries& q, int64_t begin, int64_t end,
                  const Partial& out) {
  const int dim = cache.dim, most = rows_held(cache);
  Rows rows(dim, cache.heads * (q.count < most ? q.count : most));
  TileScales scales;
  const auto open = [&](int head, const Tile& tile) {
    rows.open(head_of(cache, head, 1), tile, scales);
  };
  for (int from = 0; from < q.count; from += most) {
    const int count = q.count - from < most ? q.count - from : most;
    for (int head = 0; head < cache.heads; ++head)
      for (int r = 0; r < count; ++r)
        rows.take_query(head * count + r, q.rows + head * q.next + int64_t(from + r) * dim);
    walk<kDotRows>(cache, begin, end, count, open, [&](auto block, int head, int at,
                                                       const Tile& tile) {
      constexpr int R = decltype(block)::count;
      const int first = from + at, n = rounded_up(tile.count), row = head * count + at;
      if (!sees(q, first, R, tile)) return;
      const Cache one = head_of(cache, head, 1);
      const Partial partial = head_of(out, head);
      const bool edge = at_edge<R>(q, first, tile);
      alignas(64) float scores[R][kTile], peaks[R];
      alignas(64) uint8_t weights[2][R][kTile];
      float steps[R];
      Softened soft[R];
      const auto scaled = [&](int r, float* of, const float* sum) {
        const float peak = scale_scores(of, scales.keys, 1.0f, n, sum);
        if (!edge) return peak;
        mask_scores(q, first + r, tile, of);
        return peak_of(of, n);
      };
      rows.template scores<R>(row, 0, n, scores, after(one, tile, one.keys, at, R, count));
      int fine[R], fines = 0;  // rows that take their second digits
      for (int r = 0; r < R; ++r) {
        peaks[r] = scaled(r, scores[r], nullptr);
        if (stands_out(peaks[r], partial.top[first + r], partial.sum[first + r])) fine[fines++] = r;
      }
      // Each by itself, or all together where they are most: the numbers are the same.
      const bool together = 2 * fines > R;
      alignas(64) float more[R][kTile];
      if (together) rows.template scores<R>(row, 1, n, more, Ahead{});
      for (int i = 0; i < fines; ++i) {
        const int r = fine[i];
        if (!together) rows.template scores<1>(row + r, 1, n, more + r, Ahead{});
        peaks[r] = scaled(r, more[r], scores[r]);
        memcpy(scores[r], more[r], sizeof scores[r]);
      }
      for (int r = 0, i = 0; r < R; ++r) {
        soft[r] = soften(scores[r], n, peaks[r], scales.values, partial.top + first + r,
                         partial.sum + first + r);
        const bool second = i < fines && fine[i] == r;
        i += second;
        steps[r] = weight_digits(scores[r], n, soft[r].largest, weights[0][r],
                                 second ? weights[1][r] : nullptr);
        if (!second && together) memset(weights[1][r], 0, sizeof weights[1][r]);
      }
      float* const mix = partial.mix + int64_t(first) * dim;
      rows.template mix<R>(weights[0], steps, soft, n, mix,
                           after(one, tile, one.values, at, R, count));
      for (int r = 0; r < R; ++r) steps[r] *= 1.0f / 256, soft[r].keep = 1.0f;
      if (together) {
        rows.template mix<R>(weights[1], steps, soft, n, mix, Ahead{});
      } else {
        for (int i = 0; i < fines; ++i)
          rows.template mix<1>(weights[1] + fine[i], steps + fine[i], soft + fine[i], n,
                               mix + fine[i] * dim, Ahead{});
      }
    });
  }
}
