// Attention over static state: norm, rotate, store rows, attend; spread over threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace edge_kv {

// Runs task(context, i) for i in [0, count), on as many threads as the caller's pool has.
struct Pool {
  int threads;
  void (*run)(int64_t count, void (*task)(void* context, int64_t i), void* context);
};

// task(i) for i in [0, count) on a pool.
template <class F>
void parallel(const Pool& pool, int64_t count, F task) {
  if (count == 1 || pool.threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  pool.run(count, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); }, &task);
}

// Memory of the calling thread at a multiple of 64 bytes, good until it asks again; kept between
// steps.
float* scratch(size_t floats);

// Buffers of one layer, [kv_heads, slots, dim] and scales [kv_heads, slots] (null unless int8);
// `key_zero` as in Cache.
struct Buffers {
  void* keys;
  float* key_scales;
  void* values;
  float* value_scales;
  int64_t slots;
  int kv_heads;
  int dim;
  Storage storage;
  int key_zero = 0;
};

// cos and sin [tokens, dim / 2] of the step's tokens, which start at `position`.
struct Step {
  const float* cos;
  const float* sin;
  int tokens;
  int64_t position;
  float eps;

  int64_t end() const { return position + tokens; }
  // Positions that any of the tokens sees, back from end(); a window of 0 sees all.
  int64_t seen(int64_t window) const {
    return window ? std::min(end(), window + tokens - 1) : end();
  }
};

// Store raw k and v [tokens, kv_heads * dim]: keys normed and rotated, values normed if `v_norm`.
void store_rows(const Kernels&, const Pool&, const Buffers&, const Step&, const float* k,
                const float* v, const float* k_norm, bool v_norm);

// Attend with raw q [tokens, q_heads * dim] over what is stored; out has the shape of q.
void attend_rows(const Kernels&, const Pool&, const Buffers&, const Step&, const float* q,
                 int q_heads, const float* q_norm, int64_t window, float scale, float* out);

}  // namespace edge_kv
