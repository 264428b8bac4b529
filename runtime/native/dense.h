// A packed matrix times vectors, with both sides in integers: what a model spends its time on.
#pragma once

#include <cstdint>

#include "attention.h"
#include "kernels.h"

namespace edge_kv {

// out [tokens, n_out] = x [tokens, n_in] times packed rows [n_out, n_in] as in `linear_packed`.
// x is rounded to 8 bits, with a scale for every `block` values as the weights have.
void dense(const Kernels&, const Pool&, const float* x, int64_t tokens, const uint8_t* packed,
           const float* scales, int64_t n_out, int64_t n_in, int bits, int64_t block, float* out);

}  // namespace edge_kv
