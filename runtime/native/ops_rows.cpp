// norm_rope, norm_add, sinkhorn and softcap: what is done to rows on their way.
#include <cmath>

#include "fused.h"
#include "ops.h"

namespace edge_kv {
namespace {

constexpr int64_t kMinValues = 1 << 16;  // worth a thread

}  // namespace

void norm_rope(Call& call) {
  const View &x = call.in[0], &weight = call.in[1], &cos = call.in[2], &sin = call.in[3];
  const double eps = call.attributes[0].real;
  const std::string_view style = call.attributes[1].text;
  if (x.rank < 2 || x.rank > 3 || x.shape[x.rank - 1] > kMostOfAxis)
    refuse("x is ", x, "; it must be [tokens, heads, dim] or [tokens, dim].");
  const int64_t tokens = x.shape[0], heads = x.rank == 3 ? x.shape[1] : 1;
  const int64_t dim = x.shape[x.rank - 1];
  if (weight && (weight.rank != 1 || weight.shape[0] != dim))
    refuse("weight is ", weight, "; a row of x has ", dim, " values.");
  if (bool(cos) != bool(sin)) refuse("cos is ", cos, " and sin is ", sin, "; both or neither.");
  int64_t angles = 0;
  for (const View* part : {&cos, &sin}) {
    if (!*part) continue;
    angles = cos.rank == 2 ? cos.shape[1] : 0;
    if (part->rank != 2 || part->shape[0] != tokens || part->shape[1] != angles ||
        angles > dim / 2)
      refuse("cos is ", cos, " and sin is ", sin, "; x is ", x, ", so both must be [", tokens,
             ", at most ", dim / 2, "].");
  }
  if (!(eps < 1e9)) refuse("eps is ", eps, "; it must be small, or negative for no norm.");
  if (style != "halves" && style != "pairs_last")
    refuse("style is \"", style, "\"; it must be \"halves\" or \"pairs_last\".");
  const View out = call.output_like(0, x);

  const Rotation rotation = style == "halves" ? Rotation::halves : Rotation::pairs_last;
  const Pool team{tokens * heads * dim < kMinValues ? 1 : call.pool.threads, call.pool.run};
  parallel(team, tokens, [&](int64_t t) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t row = (t * heads + h) * dim;
      call.kernels.norm_rope(x.as<const float>() + row, weight.as<const float>(),
                             cos.as<const float>() + t * angles, sin.as<const float>() + t * angles,
                             int(angles), rotation, int(dim), float(eps), 1.0f,
                             out.as<float>() + row);
    }
  });
}

// residual + norm(x), times a scale where given.
void norm_add(Call& call) {
  const View &x = call.in[0], &weight = call.in[1], &residual = call.in[2], &scale = call.in[3];
  const double eps = call.attributes[0].real;
  if (x.rank != 2 || x.shape[1] > kMostOfAxis)
    refuse("x is ", x, "; it must be [tokens, values].");
  const int64_t tokens = x.shape[0], dim = x.shape[1];
  if (weight.rank != 1 || weight.shape[0] != dim)
    refuse("weight is ", weight, "; a row of x has ", dim, " values.");
  if (residual.rank != 2 || residual.shape[0] != tokens || residual.shape[1] != dim)
    refuse("residual is ", residual, " and x is ", x, "; they must have the same shape.");
  if (scale && scale.count() != 1) refuse("scale is ", scale, "; it must hold one number.");
  if (!(eps >= 0 && eps < 1e9)) refuse("eps is ", eps, "; it must be small and 0 or more.");
  const View out = call.output_like(0, x);

  const float by = scale ? *scale.as<const float>() : 1.0f;
  const Pool team{tokens * dim < kMinValues ? 1 : call.pool.threads, call.pool.run};
  parallel(team, tokens, [&](int64_t t) {
    float* const to = out.as<float>() + t * dim;
    const float* const add = residual.as<const float>() + t * dim;
    call.kernels.norm_rope(x.as<const float>() + t * dim, weight.as<const float>(), nullptr,
                           nullptr, 0, Rotation::halves, int(dim), float(eps), 1.0f, to);
    for (int64_t d = 0; d < dim; ++d) to[d] = (to[d] + add[d]) * by;
  });
}

// Softmax over the last axis plus eps, then columns and rows brought to a sum of one in turn, columns
// first and last.
void sinkhorn(Call& call) {
  const View& x = call.in[0];
  const int64_t iters = call.attributes[0].whole;
  const float eps = float(call.attributes[1].real);
  if (x.rank != 3 || x.shape[1] != x.shape[2] || x.shape[2] > 1024)
    refuse("x is ", x, "; it must be [tokens, k, k] with k at most 1024.");
  if (iters < 1 || iters > 10000) refuse("iters is ", iters, "; it must be 1 … 10000.");
  if (!(eps >= 0.0f && eps < 1.0f)) refuse("eps is ", double(eps), "; it must be 0 … 1.");
  const View out = call.output_like(0, x);

  const int64_t k = x.shape[2];
  const Pool team{x.count() * iters < kMinValues ? 1 : call.pool.threads, call.pool.run};
  parallel(team, x.shape[0], [&](int64_t t) {
    const float* from = x.as<const float>() + t * k * k;
    float* const m = out.as<float>() + t * k * k;
    // Divide `count` values, `step` apart, by their sum plus eps.
    const auto even = [&](float* line, int64_t step) {
      float sum = eps;
      for (int64_t i = 0; i < k; ++i) sum += line[i * step];
      for (int64_t i = 0; i < k; ++i) line[i * step] /= sum;
    };
    for (int64_t row = 0; row < k; ++row) {
      float top = from[row * k], sum = 0.0f;
      for (int64_t i = 0; i < k; ++i) top = from[row * k + i] > top ? from[row * k + i] : top;
      for (int64_t i = 0; i < k; ++i) sum += m[row * k + i] = std::exp(from[row * k + i] - top);
      for (int64_t i = 0; i < k; ++i) m[row * k + i] = m[row * k + i] / sum + eps;
    }
    for (int64_t i = 0; i < iters; ++i) {
      for (int64_t row = 0; i > 0 && row < k; ++row) even(m + row * k, 1);
      for (int64_t column = 0; column < k; ++column) even(m + column, k);
    }
  });
}

void softcap(Call& call) {
  const View& x = call.in[0];
  const float cap = float(call.attributes[0].real);
  if (!(cap > 0 && cap < 1e30f)) refuse("cap is ", double(cap), "; it must be above 0 and finite.");
  const View out = call.output_like(0, x);
  softcap(call.kernels, call.pool, x.as<const float>(), x.count(), cap, out.as<float>());
}

}  // namespace edge_kv
