// What lies between two products of a decoder, and products with float weights; spread over threads.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "kernels.h"

namespace edge_kv {

// out [rows, dim] = x * rsqrt(mean(x^2) + eps) * weight [dim] (null: 1), row by row.
void norm_rows(const Kernels&, const Pool&, const float* x, int64_t rows, int64_t dim,
               const float* weight, float eps, float* out);

// out = activation(gate) * up; a limit above 0 first bounds gate from above and up on both sides.
void gated_values(const Kernels&, const Pool&, const float* gate, const float* up, int64_t count,
                  Activation, float limit, float* out);

// out = tanh(x / cap) * cap
void softcap(const Kernels&, const Pool&, const float* x, int64_t count, float cap, float* out);

// out [tokens, n_out] = x [tokens, n_in] times rows [n_out, n_in].
void linear_float(const Kernels&, const Pool&, const float* x, int64_t tokens, const float* rows,
                  int64_t n_out, int64_t n_in, float* out);

}  // namespace edge_kv
