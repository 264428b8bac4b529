// The edge_kv:: operators of a .pte on the kernels; schemas and meaning: export/executorch_ops.py.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include <optional>
#include <string_view>

#include "attention.h"
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

// Check the state tensors of a layer against each other and take their addresses.
bool buffers_of(const Tensor& keys, const OptionalTensor& key_scales, const Tensor& values,
                const OptionalTensor& value_scales, Buffers& out) {
  if (keys.dim() != 3 || !same_shape(keys, values) || keys.scalar_type() != values.scalar_type())
    return false;
  switch (keys.scalar_type()) {
    case ScalarType::Float: out.storage = Storage::f32; break;
    case ScalarType::Half: out.storage = Storage::f16; break;
    case ScalarType::Char: out.storage = Storage::int8; break;
    default: return false;
  }
  const bool scaled = out.storage == Storage::int8;
  if (key_scales.has_value() != scaled || value_scales.has_value() != scaled) return false;
  out.keys = keys.mutable_data_ptr();
  out.values = values.mutable_data_ptr();
  out.key_scales = scaled ? key_scales->mutable_data_ptr<float>() : nullptr;
  out.value_scales = scaled ? value_scales->mutable_data_ptr<float>() : nullptr;
  out.kv_heads = int(keys.size(0));
  out.slots = keys.size(1);
  out.dim = int(keys.size(2));
  return true;
}

bool step_of(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& pos,
             const Buffers& buffers, int64_t window, double eps, Step& out) {
  if (x.dim() != 2 || !floats(x) || !floats(cos) || !floats(sin) || pos.numel() != 1 ||
      pos.scalar_type() != ScalarType::Long || !same_shape(cos, sin) || cos.dim() != 2 ||
      cos.size(0) != x.size(0) || 2 * cos.size(1) != buffers.dim)
    return false;
  out = {cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), int(x.size(0)),
         pos.const_data_ptr<int64_t>()[0], float(eps)};
  // A ring must hold every row that the step's oldest query sees; other buffers never wrap.
  return out.position >= 0 && out.seen(window) <= buffers.slots;
}

Tensor& attend_own(KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& q_norm, const Tensor& k_norm, const Tensor& cos, const Tensor& sin,
                   const Tensor& keys, const OptionalTensor& key_scales, const Tensor& values,
                   const OptionalTensor& value_scales, const Tensor& pos, int64_t window,
                   bool v_norm, double eps, double scale, Tensor& out) {
  Buffers buffers;
  Step step;
  ET_KERNEL_CHECK(context, buffers_of(keys, key_scales, values, value_scales, buffers),
                  InvalidArgument, out);
  ET_KERNEL_CHECK(context, step_of(q, cos, sin, pos, buffers, window, eps, step), InvalidArgument,
                  out);
  const int64_t width = int64_t(buffers.kv_heads) * buffers.dim;
  ET_KERNEL_CHECK(context,
                  floats(k) && floats(v) && same_shape(k, v) && k.dim() == 2 &&
                      k.size(0) == step.tokens && k.size(1) == width && q.size(1) % width == 0 &&
                      q_norm.numel() == buffers.dim && k_norm.numel() == buffers.dim,
                  InvalidArgument, out);
  ET_KERNEL_CHECK(context,
                  executorch::runtime::resize_tensor(out, q.sizes()) ==
                      executorch::runtime::Error::Ok,
                  InvalidArgument, out);
  const Kernels& kernels = best_kernels();
  const Pool threads = running_pool();
  store_rows(kernels, threads, buffers, step, k.const_data_ptr<float>(), v.const_data_ptr<float>(),
             k_norm.const_data_ptr<float>(), v_norm);
  attend_rows(kernels, threads, buffers, step, q.const_data_ptr<float>(),
              int(q.size(1) / buffers.dim), q_norm.const_data_ptr<float>(), window, float(scale),
              out.mutable_data_ptr<float>());
  return out;
}

Tensor& attend_shared(KernelRuntimeContext& context, const Tensor& q, const Tensor& q_norm,
                      const Tensor& cos, const Tensor& sin, const Tensor& keys,
                      const OptionalTensor& key_scales, const Tensor& values,
                      const OptionalTensor& value_scales, const Tensor& pos, int64_t window,
                      double eps, double scale, Tensor& out) {
  Buffers buffers;
  Step step;
  ET_KERNEL_CHECK(context, buffers_of(keys, key_scales, values, value_scales, buffers),
                  InvalidArgument, out);
  ET_KERNEL_CHECK(context, step_of(q, cos, sin, pos, buffers, window, eps, step), InvalidArgument,
                  out);
  ET_KERNEL_CHECK(context,
                  q.size(1) % (int64_t(buffers.kv_heads) * buffers.dim) == 0 &&
                      q_norm.numel() == buffers.dim,
                  InvalidArgument, out);
  ET_KERNEL_CHECK(context,
                  executorch::runtime::resize_tensor(out, q.sizes()) ==
                      executorch::runtime::Error::Ok,
                  InvalidArgument, out);
  attend_rows(best_kernels(), running_pool(), buffers, step, q.const_data_ptr<float>(),
              int(q.size(1) / buffers.dim), q_norm.const_data_ptr<float>(), window, float(scale),
              out.mutable_data_ptr<float>());
  return out;
}

Tensor& store_own(KernelRuntimeContext& context, const Tensor& k, const Tensor& v,
                  const Tensor& k_norm, const Tensor& cos, const Tensor& sin, const Tensor& keys,
                  const OptionalTensor& key_scales, const Tensor& values,
                  const OptionalTensor& value_scales, const Tensor& pos, bool v_norm, double eps,
                  Tensor& out) {
  Buffers buffers;
  Step step;
  ET_KERNEL_CHECK(context, buffers_of(keys, key_scales, values, value_scales, buffers),
                  InvalidArgument, out);
  ET_KERNEL_CHECK(context, step_of(k, cos, sin, pos, buffers, 1, eps, step), InvalidArgument, out);
  ET_KERNEL_CHECK(context,
                  floats(v) && same_shape(k, v) &&
                      k.size(1) == int64_t(buffers.kv_heads) * buffers.dim &&
                      k_norm.numel() == buffers.dim && out.numel() == 1,
                  InvalidArgument, out);
  store_rows(best_kernels(), running_pool(), buffers, step, k.const_data_ptr<float>(),
             v.const_data_ptr<float>(), k_norm.const_data_ptr<float>(), v_norm);
  out.mutable_data_ptr<int64_t>()[0] = step.position + step.tokens;
  return out;
}

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

Tensor& gelu_mul(KernelRuntimeContext& context, const Tensor& gate, const Tensor& up, Tensor& out) {
  return gated(context, gate, up, "gelu_tanh", 0.0, out);
}

Tensor& softcap_all(KernelRuntimeContext& context, const Tensor& x, double cap, Tensor& out) {
  ET_KERNEL_CHECK(context, floats(x) && cap > 0, InvalidArgument, out);
  ET_KERNEL_CHECK(context,
                  executorch::runtime::resize_tensor(out, x.sizes()) ==
                      executorch::runtime::Error::Ok,
                  InvalidArgument, out);
  softcap(best_kernels(), running_pool(), x.const_data_ptr<float>(), x.numel(), float(cap),
          out.mutable_data_ptr<float>());
  return out;
}

EXECUTORCH_LIBRARY(edge_kv, "attend_own.out", attend_own);
EXECUTORCH_LIBRARY(edge_kv, "attend_shared.out", attend_shared);
EXECUTORCH_LIBRARY(edge_kv, "store_own.out", store_own);
EXECUTORCH_LIBRARY(edge_kv, "linear.out", linear);
EXECUTORCH_LIBRARY(edge_kv, "rms_norm.out", rms_norm);
EXECUTORCH_LIBRARY(edge_kv, "gated.out", gated);
EXECUTORCH_LIBRARY(edge_kv, "gelu_mul.out", gelu_mul);
EXECUTORCH_LIBRARY(edge_kv, "softcap.out", softcap_all);

}  // namespace
}  // namespace edge_kv
