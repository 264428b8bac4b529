// The compute kernels of the ExecuTorch backend: plain C++ over plain memory, no runtime behind it.
//
// kernels.cpp is compiled once for every instruction set; `best_kernels` picks one when the program
// starts. attention.h puts the kernels together and spreads them over threads.
#pragma once

#include <cstdint>

namespace edge_kv {

// How a state row or a weight is stored.
enum class Storage { f32, f16, int8 };

// One KV head of a cache: rows [slots, dim]; the row of absolute position p is at p % slots.
// Scales [slots] belong to int8 rows and are null otherwise. Int8 keys are stored plus `key_zero`:
// 0, or 128 where a runtime multiplies unsigned bytes.
struct Cache {
  const void* keys;
  const float* key_scales;
  const void* values;
  const float* value_scales;
  int64_t slots;
  int dim;
  Storage storage;
  int key_zero = 0;
};

// Query rows [rows, dim], already normed, rotated and scaled; `group` consecutive rows stand at one
// position, the first at `position`. A window of W sees the W newest positions, 0 sees all.
struct Queries {
  const float* rows;
  int count;
  int group;
  int64_t position;
  int64_t window;
};

// Softmax in progress for `count` rows: running maximum, sum of exponentials, and the weighted sum
// of values [count, dim] relative to that maximum.
struct Partial {
  float* top;
  float* sum;
  float* mix;
};

constexpr float kMasked = -1e30f;

struct Kernels {
  const char* name;

  // Fold the keys at positions [begin, end) into `partial`.
  void (*attend)(const Cache&, const Queries&, int64_t begin, int64_t end, const Partial&);

  // out = x * rsqrt(mean(x^2) + eps) * weight, then rotate halves by cos and sin [dim / 2], then
  // times `scale`. A null weight is all ones, a null cos does not rotate.
  void (*norm_rope)(const float* x, const float* weight, const float* cos, const float* sin,
                    int dim, float eps, float scale, float* out);

  // Store one row; int8 rows get the scale max|x| / 127 and are shifted by `zero`, 0 or 128.
  void (*store)(const float* x, int dim, Storage, int zero, void* row, float* row_scale);

  float (*dot)(const float* a, const float* b, int n);

  // The integer matrix-vector product of dense.h: which shapes it takes, x rounded into dense_bytes
  // of memory, and rows [begin, end).
  bool (*dense_fits)(int64_t n_in, int bits, int64_t block);
  int64_t (*dense_bytes)(int bits, int64_t n_in);
  void (*dense_round)(const float* x, int64_t n_in, int bits, int64_t block, int8_t* out);
  void (*dense_rows)(const void* x, const uint8_t* packed, const float* scales, int64_t n_in,
                     int bits, int64_t block, int64_t begin, int64_t end, float* out);

  // The same for many tokens: which shapes it takes, x rounded into tile_token_bytes for each, and
  // the `tile_rows` rows from `begin` on, unpacked in tile_bytes of memory.
  int tile_rows;
  bool (*tiles_fit)(int64_t n_in, int bits, int64_t block);
  int64_t (*tile_token_bytes)(int64_t n_in, int64_t block);
  void (*tile_round)(const float* x, int64_t n_in, int bits, int64_t block, void* out);
  int64_t (*tile_bytes)(int64_t n_in, int64_t block);
  void (*tile_dense)(const uint8_t* x, int64_t tokens, const uint8_t* packed, const float* scales,
                     int64_t n_out, int64_t n_in, int bits, int64_t block, int64_t begin,
                     uint8_t* memory, float* out);
};

// The kernels for this CPU; EDGE_KV_ISA=scalar|avx2|avx512|avx512vnni|neon|dotprod in the
// environment asks for one that it supports.
const Kernels& best_kernels();

// Kernels by name, null where this build or this CPU has none.
const Kernels* find_kernels(const char* name);

float half_to_float(uint16_t half);
uint16_t float_to_half(float value);

}  // namespace edge_kv
