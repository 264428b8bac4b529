// The operators of ops.h for ExecuTorch, registered as `.out` overloads of torch operators.
//
// Arguments are the inputs, then the attributes, then the result. An operator that writes tables is
// named so (`put_in_place.out`); its result is the index after the last row.
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <string>
#include <utility>
#include <vector>

#include "ops.h"
#include "running.h"

namespace edge_kv {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;
using ExecuTorchTensor = executorch::aten::Tensor;

constexpr int kMostAxes = 8;

Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::Char: return Type::int8;
    case ScalarType::Byte: return Type::uint8;
    case ScalarType::Long: return Type::int64;
    default: return Type::other;
  }
}

struct Tensor : View {
  int64_t axes[kMostAxes];
};

void describe(const ExecuTorchTensor& tensor, const char* name, Tensor& out) {
  if (tensor.dim() > kMostAxes) refuse(name, " has ", int64_t(tensor.dim()), " axes.");
  for (int i = 0; i < int(tensor.dim()); ++i) out.axes[i] = tensor.size(i);
  out.data = tensor.mutable_data_ptr();
  out.type = type_of(tensor.scalar_type());
  out.rank = int(tensor.dim());
  out.shape = out.axes;
}

class ExecuTorchCall : public Call {
 public:
  ExecuTorchCall(const Pool& on, const View* inputs, const Attribute* values,
                 ExecuTorchTensor& result)
      : Call(best_kernels(), on, inputs, values), result_(result) {
    exact = running().exact;
  }

  View output(int, Type type, std::initializer_list<int64_t> shape) override {
    return make(type, shape.begin(), int(shape.size()));
  }
  View output_like(int, const View& like) override { return make(like.type, like.shape, like.rank); }

 private:
  View make(Type type, const int64_t* shape, int rank) {
    SizesType sizes[kMostAxes];
    for (int i = 0; i < rank; ++i) sizes[i] = SizesType(shape[i]);
    if (type_of(result_.scalar_type()) != type ||
        executorch::runtime::resize_tensor(result_, {sizes, size_t(rank)}) != Error::Ok)
      refuse("the program has no room for the result, ", View{nullptr, type, rank, shape}, ".");
    return {result_.mutable_data_ptr(), type, rank, shape};
  }

  ExecuTorchTensor& result_;
};

// Call `of` with what a value of the program holds, if it holds that.
template <class T, class F>
void take(const executorch::runtime::Result<T>& value, const char* name, F of) {
  if (!value.ok()) refuse(name, " is not of the type that the operator takes.");
  of(value.get());
}

void run(const Operator& op, Span<EValue*> values) {
  const int inputs = op.input_count(), parameters = op.parameter_count();
  const int given = int(values.size()) - inputs - 2;  // without the result, which is there twice
  if (given > parameters) refuse(op.name, " has too many arguments.");
  if (given < parameters && (given < 0 || !op.parameters[given].optional))
    refuse(op.name, " has too few arguments.");
  Tensor tensors[kMostInputs];
  View views[kMostInputs];
  for (int i = 0; i < inputs; ++i) {
    if (values[i]->isNone()) continue;
    if (!values[i]->isTensor()) refuse(op.inputs[i].name, " is no tensor.");
    describe(values[i]->toTensor(), op.inputs[i].name, tensors[i]);
    views[i] = tensors[i];
  }
  Attribute attributes[kMostParameters];
  for (int i = 0; i < given; ++i) {
    const EValue& value = *values[inputs + i];
    const char* const name = op.parameters[i].name;
    Attribute& to = attributes[i];
    switch (op.parameters[i].kind) {
      case Kind::real: take(value.tryToDouble(), name, [&](double x) { to.real = x; }); break;
      case Kind::whole: take(value.tryToInt(), name, [&](int64_t x) { to.whole = x; }); break;
      case Kind::text: take(value.tryToString(), name, [&](auto x) { to.text = x; }); break;
      case Kind::list:
        take(value.tryToIntList(), name, [&](auto x) { to.list = x.data(), to.length = x.size(); });
        break;
    }
  }
  EValue& last = *values[inputs + given];
  if (!last.isTensor()) refuse(op.name, " has no tensor for its result.");
  ExecuTorchTensor& result = last.toTensor();
  const bool writes = op.result == Type::none;
  if (writes && (type_of(result.scalar_type()) != Type::int64 || result.numel() != 1))
    refuse("the result must hold one index.");
  const Pool threads = running_pool();
  ExecuTorchCall call(threads, views, attributes, result);
  const std::string why = invoke(op, call);
  if (!why.empty()) throw Refusal{why};
  // put(table, scales, rows, start): what follows in the program waits for this value.
  if (writes) *result.mutable_data_ptr<int64_t>() = *views[3].as<int64_t>() + views[2].shape[0];
}

template <size_t at>
void boxed(KernelRuntimeContext& context, Span<EValue*> values) {
  try {
    run(kOperators[at], values);
  } catch (const Refusal& refusal) {
    ET_LOG(Error, "%s", refusal.why.c_str());
    context.fail(Error::InvalidArgument);
  }
}

template <size_t... at>
bool add_all(std::index_sequence<at...>) {
  // The registry keeps the names.
  static std::vector<std::string> names;
  names.reserve(kOperatorCount);
  std::vector<executorch::runtime::Kernel> kernels;
  const auto add = [&](const Operator& op, executorch::runtime::OpFunction function) {
    const char* const suffix = op.result == Type::none ? "_in_place.out" : ".out";
    names.push_back(std::string("edge_kv::") + op.name + suffix);
    kernels.emplace_back(names.back().c_str(), function);
  };
  (add(kOperators[at], boxed<at>), ...);
  return executorch::runtime::register_kernels({kernels.data(), kernels.size()}) == Error::Ok;
}

const bool added = add_all(std::make_index_sequence<kOperatorCount>());

}  // namespace
}  // namespace edge_kv
