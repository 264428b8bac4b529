// What lies between two products of a .pte, and float products (fused.h), as operators of
// ExecuTorch; schemas and meaning: export/executorch_ops.py.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include <optional>
#include <string_view>

#include "fused.h"
#include "running.h"

namespace edge_kv {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;
using OptionalTensor = std::optional<Tensor>;

bool floats(const Tensor& t) { return t.scalar_type() == ScalarType::Float; }

bool same_shape(const Tensor& a, const Tensor& b) { return a.sizes() == b.sizes(); }

bool resized(Tensor& out, const Tensor& like, int64_t width) {
  SizesType sizes[executorch::runtime::kTensorDimensionLimit];
  for (int i = 0; i < int(like.dim()); ++i) sizes[i] = SizesType(like.size(i));
  sizes[like.dim() - 1] = SizesType(width);
  return executorch::runtime::resize_tensor(out, {sizes, size_t(like.dim())}) ==
         executorch::runtime::Error::Ok;
}

int64_t width_of(const Tensor& x) { return x.size(x.dim() - 1); }

Tensor& linear(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight, Tensor& out) {
  ET_KERNEL_CHECK(context,
                  x.dim() > 0 && floats(x) && weight.dim() == 2 && floats(weight) &&
                      weight.size(1) > 0 && width_of(x) == weight.size(1),
                  InvalidArgument, out);
  ET_KERNEL_CHECK(context, resized(out, x, weight.size(0)), InvalidArgument, out);
  linear_float(best_kernels(), running_pool(), x.const_data_ptr<float>(),
               x.numel() / weight.size(1), weight.const_data_ptr<float>(), weight.size(0),
               weight.size(1), out.mutable_data_ptr<float>());
  return out;
}

Tensor& rms_norm(KernelRuntimeContext& context, const Tensor& x, const OptionalTensor& weight,
                 double eps, Tensor& out) {
  ET_KERNEL_CHECK(context, x.dim() > 0 && floats(x) && width_of(x) > 0, InvalidArgument, out);
  ET_KERNEL_CHECK(context,
                  !weight.has_value() || (weight->dim() == 1 && floats(*weight) &&
                                          weight->numel() == width_of(x)),
                  InvalidArgument, out);
  ET_KERNEL_CHECK(context, resized(out, x, width_of(x)), InvalidArgument, out);
  norm_rows(best_kernels(), running_pool(), x.const_data_ptr<float>(), x.numel() / width_of(x),
            width_of(x), weight.has_value() ? weight->const_data_ptr<float>() : nullptr,
            float(eps), out.mutable_data_ptr<float>());
  return out;
}

Tensor& gated(KernelRuntimeContext& context, const Tensor& gate, const Tensor& up,
              std::string_view act, double limit, Tensor& out) {
  const bool silu = act == "silu";
  ET_KERNEL_CHECK(context,
                  gate.dim() > 0 && floats(gate) && floats(up) && same_shape(gate, up) &&
                      (silu || act == "gelu_tanh") && limit >= 0,
                  InvalidArgument, out);
  ET_KERNEL_CHECK(context, resized(out, gate, width_of(gate)), InvalidArgument, out);
  gated_values(best_kernels(), running_pool(), gate.const_data_ptr<float>(),
               up.const_data_ptr<float>(), gate.numel(),
               silu ? Activation::silu : Activation::gelu_tanh, float(limit),
               out.mutable_data_ptr<float>());
  return out;
}

EXECUTORCH_LIBRARY(edge_kv, "linear.out", linear);
EXECUTORCH_LIBRARY(edge_kv, "rms_norm.out", rms_norm);
EXECUTORCH_LIBRARY(edge_kv, "gated.out", gated);

}  // namespace
}  // namespace edge_kv
