// The compute kernels of the ExecuTorch backend: plain C++ over plain memory, no runtime behind it.
//
// kernels.cpp is compiled once for every instruction set; `best_kernels` picks one when the program
// starts. The operators (ops.h) put the kernels together and spread them over threads.
#pragma once

#include <cstdint>

namespace edge_kv {

// How a state row or a weight is stored.
enum class Storage { f32, f16, int8 };

// Which values of a row an angle turns: value i and value i + angles, or values 2i and 2i + 1 of the
// last 2 * angles.
enum class Rotation { halves, pairs_last };

// Of a gated product.
enum class Activation { silu, gelu_tanh };

// KV heads of a cache: rows of `dim` elements, `row_stride` elements from one slot to the next; row i
// is at slot i % slots. Scales, `scale_stride` floats apart, belong to int8 rows, are positive, and
// null otherwise. The rows of further heads, and their scales, adjoin.
struct Cache {
  const void* keys;
  const float* key_scales;
  const void* values;
  const float* value_scales;
  int64_t slots;
  int dim;
  int64_t row_stride;
  int64_t scale_stride;
  Storage storage;
  int heads = 1;
};

// Query rows [count, dim] of a head, already normed, rotated and scaled; those of the next head are
// `next` floats on. `group` consecutive rows stand at one position, the first at `position`. Row i of the cache stands for the positions i * stride …
// i * stride + stride - 1 and is seen once its last one is not later than the query's. A window of W
// (with a stride of 1) sees the W newest positions, 0 sees all.
struct Queries {
  const float* rows;
  int count;
  int group;
  int64_t position;
  int64_t window;
  int64_t stride = 1;
  int64_t next = 0;

  // The newest row that query row r sees; -1: none.
  int64_t newest(int r) const { return (position + r / group + 1) / stride - 1; }
};

// Softmax in progress for `count` rows: running maximum, sum of exponentials, and the weighted sum
// of values [count, dim] relative to that maximum; each `next` floats on for the next head.
struct Partial {
  float* top;
  float* sum;
  float* mix;
  int64_t next = 0;
};

constexpr float kMasked = -1e30f;

// Stored matrices: edge_kv/formats.py says what they are, weights.h what is done with them.
constexpr int kBlockValues = 32;  // values of a row that share a scale
constexpr int kGroupRows = 16;  // rows that are stored together
constexpr int kLineBytes = 64;   // bytes: four of each row of a group
constexpr int8_t kLevels[16] = {-127, -102, -82, -65, -50, -36, -22, -9,
                                3,    16,   29,  43,  57,  73,  92,  115};

enum class Scale { row, s8, f16 };  // one f32 a row; a byte a block besides; a half a block

struct Format {
  const char* name;
  int bits;
  Scale scale;
  bool levels;  // codes are indices into kLevels

  constexpr int head() const { return scale != Scale::f16; }  // lines of row scales
  constexpr int served() const {  // blocks whose scales fill a line
    return scale == Scale::row ? 0 : scale == Scale::s8 ? 4 : 2;
  }
};

// Bytes of one token's rounded activations: a record of every block.
constexpr int64_t rounded_stride(int64_t cols) {
  const int64_t blocks = (cols + kBlockValues - 1) / kBlockValues;
  return (blocks * (kBlockValues + 8) + kLineBytes - 1) / kLineBytes * kLineBytes;
}

struct Kernels {
  const char* name;

  // Fold the rows [begin, end) of all heads into `partial`.
  void (*attend)(const Cache&, const Queries&, int64_t begin, int64_t end, const Partial&);

  // out = x * rsqrt(mean(x^2) + eps) * weight, then rotated by cos and sin [angles], then times
  // `scale`. A negative eps does not norm, a null weight is all ones.
  void (*norm_rope)(const float* x, const float* weight, const float* cos, const float* sin,
                    int angles, Rotation, int dim, float eps, float scale, float* out);

  // Store one row; int8 rows get the scale max|x| / 127 and are shifted by `zero`, 0 or 128.
  void (*store)(const float* x, int dim, Storage, void* row, float* row_scale);

  float (*dot)(const float* a, const float* b, int n);

  // out = activation(gate) * up; a limit above 0 bounds gate from above and up on both sides first.
  void (*gated)(const float* gate, const float* up, int64_t n, Activation, float limit, float* out);

  // scores[i - begin] = sum over the query rows r of weights[r] * max(0, q[r] . key i).
  void (*relu_scores)(const Cache&, const float* q, int rows, const float* weights, int64_t begin,
                      int64_t end, float* scores);

  // What fused.h spreads over threads: `float_rows` is rows [count, n_in] times every token, into
  // columns of `out`, whose rows are `stride` apart.
  void (*softcap)(const float* x, int64_t count, float cap, float* out);
  // out = x as whole numbers of `step`, -128 … 127 of them.
  void (*to_steps)(const float* x, int64_t count, float step, float* out);
  void (*float_rows)(const float* x, int64_t tokens, const float* rows, int64_t count, int64_t n_in,
                     float* out, int64_t stride);

  // Activations of one token into `rounded_stride` bytes: see `round_activations`.
  void (*round_row)(const float* x, int64_t cols, float step, void* out);

  // `groups` groups of rows, `rows` of which are of the matrix, with rounded activations of tokens
  // that are `x_stride` bytes apart; rows of `out` are `stride` apart.
  void (*multiply)(const Format&, const uint8_t* data, int64_t groups, int64_t blocks,
                   const uint8_t* x, int64_t x_stride, int64_t tokens, float* out, int64_t stride,
                   int64_t rows);
};

// The kernels for this CPU; EDGE_KV_ISA=scalar|avx2|avx512|avx512vnni|neon|dotprod in the
// environment asks for one that it supports.
const Kernels& best_kernels();

// Kernels by name, null where this build or this CPU has none.
const Kernels* find_kernels(const char* name);

float half_to_float(uint16_t half);

}  // namespace edge_kv
