// Matrices as edge_kv/formats.py stores them, and their products: what a model spends its time on.
//
// Sixteen rows lie together. A line of 64 bytes holds four of each row, or a scale of each; block
// scales come before the values they belong to. Activations are rounded to 8 bits, a step for every
// 32 of them, so that a block meets them in integers: this is done once for all products with them.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "kernels.h"

namespace edge_kv {

// A stored matrix [rows, cols]; `data` is aligned to 4 bytes or more.
struct Weights {
  const Format* format;
  const uint8_t* data;
  int64_t rows, cols;
};

// The format of a name, null where there is none.
const Format* find_format(const char* name);

// Bytes of sixteen rows, and of a whole matrix.
int64_t group_bytes(const Format&, int64_t cols);
int64_t weight_bytes(const Format&, int64_t rows, int64_t cols);

// Rounded activations of `tokens` rows of `cols` values.
struct Rounded {
  const uint8_t* data;
  int64_t tokens, cols;
};

// Bytes that `round_activations` fills.
int64_t rounded_bytes(int64_t tokens, int64_t cols);

// Parts that the product of `tokens` tokens with a matrix is cut into: each thread reads one stretch of
// memory, or several long ones that others can take over.
int64_t tasks_of(const Pool&, const Weights&, int64_t tokens);

// Round x [tokens, cols] into `memory`: a block's step is 1/127 of its largest value, or `step`
// where that is not 0 (values beyond 127 steps are cut off).
Rounded round_activations(const Kernels&, const Pool&, const float* x, int64_t tokens, int64_t cols,
                          float step, void* memory);

// What is done to the results of a product, where it is not 0: they are rounded to -128 … 127 of
// `step`, then bounded by `cap` as `softcap` does.
struct Finish {
  float step = 0.0f, cap = 0.0f;

  // Of `count` values that adjoin.
  void operator()(const Kernels&, float* values, int64_t count) const;
};

// out [tokens, w.rows] = x times w, the rows of `out` being `stride` apart.
void multiply(const Kernels&, const Pool&, const Rounded& x, const Weights& w, float* out,
              int64_t stride, Finish finish = {});

// The two together, with memory of this thread.
void linear_q(const Kernels&, const Pool&, const float* x, int64_t tokens, const Weights& w,
              float step, float* out, Finish finish = {});

// The same with activations as they are: slow, and what a lowering is compared with.
void linear_exact(const Kernels&, const Pool&, const float* x, int64_t tokens, const Weights& w,
                  float* out, Finish finish = {});

// Row `row` in floats, out [w.cols].
void embed_row(const Weights& w, int64_t row, float* out);

}  // namespace edge_kv
