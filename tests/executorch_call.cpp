// edge_kv_call of kernel_interface.cpp through the operators that are registered with ExecuTorch: the
// tests of the operators take this library in place of that one.
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "ops.h"

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::TensorImpl;
using executorch::runtime::EValue;

namespace {

struct TensorArgument {  // edge_kv_tensor
  void* data;
  int32_t type, rank;
  int64_t shape[8];
};

struct AttributeArgument {  // edge_kv_attribute
  double real;
  int64_t whole;
  const int64_t* list;
  int64_t length;
  const char* text;
};

std::string logged;

void keep_log(et_timestamp_t, et_pal_log_level_t, const char*, const char*, size_t,
              const char* message, size_t length) {
  logged.assign(message, length);
}

ScalarType scalar_of(int32_t type) {
  const ScalarType types[] = {ScalarType::Double, ScalarType::Float, ScalarType::Half,
                              ScalarType::Char,   ScalarType::Byte,  ScalarType::Long,
                              ScalarType::Double};
  return types[type];
}

// A tensor and the arrays that it points to.
struct Held {
  SizesType sizes[8];
  executorch::aten::DimOrderType order[8];
  executorch::aten::StridesType strides[8];
  TensorImpl impl;

  Held(ScalarType type, void* data, int rank, const int64_t* shape)
      : impl((fill(rank, shape), type), rank, sizes, data, order, strides,
             executorch::aten::TensorShapeDynamism::DYNAMIC_BOUND) {}

 private:
  void fill(int rank, const int64_t* shape) {
    int64_t step = 1;
    for (int i = rank - 1; i >= 0; --i) {
      sizes[i] = SizesType(shape[i]);
      order[i] = uint8_t(i);
      strides[i] = executorch::aten::StridesType(step);
      step *= shape[i];
    }
  }
};

// Columns of a result [tokens, columns] that an attribute says; 0: it has the first input's shape.
int64_t columns(const edge_kv::Operator& op, const AttributeArgument* attributes) {
  if (strcmp(op.name, "select") && strcmp(op.name, "embed_q")) return 0;
  const int64_t said = attributes[0].whole;
  return said > 0 && said < 100000 ? said : 1;
}

// The most that a result of the tests holds; a program plans this memory.
int64_t room(const TensorArgument* inputs, int64_t columns) {
  if (columns) return (inputs[0].rank ? inputs[0].shape[0] : 1) * columns;
  int64_t most = inputs[0].rank ? 1 : 0;
  for (int i = 0; i < inputs[0].rank; ++i) most *= inputs[0].shape[i];
  return most;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int edge_kv_call(
    const char*, int, const char* name, TensorArgument* inputs, const AttributeArgument* attributes,
    TensorArgument* outputs, char* why, int64_t size) {
  static const bool ready = [] {
    executorch::runtime::runtime_init();
    return executorch::runtime::register_pal(
        executorch::runtime::PalImpl::create(keep_log, __FILE__));
  }();
  const edge_kv::Operator* op = nullptr;
  for (const edge_kv::Operator& of : edge_kv::kOperators)
    if (!strcmp(of.name, name)) op = &of;
  if (!ready || !op) return 1;
  const bool writes = op->result == edge_kv::Type::none;
  const auto found = executorch::runtime::get_op_function_from_registry(
      ("edge_kv::" + std::string(name) + (writes ? "_in_place.out" : ".out")).c_str());
  if (!found.ok()) return 1;

  std::deque<Held> tensors;
  std::deque<EValue> values;
  std::deque<std::vector<EValue>> numbers;
  std::deque<std::vector<EValue*>> pointers;
  std::deque<std::vector<int64_t>> room_of_lists;
  std::deque<executorch::runtime::BoxedEvalueList<int64_t>> lists;
  std::deque<executorch::aten::ArrayRef<char>> texts;
  const auto add_tensor = [&](ScalarType type, void* data, int rank, const int64_t* shape) {
    tensors.emplace_back(type, data, rank, shape);
    values.emplace_back(executorch::aten::Tensor(&tensors.back().impl));
  };
  for (int i = 0; i < op->input_count(); ++i) {
    if (inputs[i].type == 0) {
      values.emplace_back();
      continue;
    }
    add_tensor(scalar_of(inputs[i].type), inputs[i].data, inputs[i].rank, inputs[i].shape);
  }
  for (int i = 0; i < op->parameter_count(); ++i) {
    const AttributeArgument& a = attributes[i];
    switch (op->parameters[i].kind) {
      case edge_kv::Kind::real: values.emplace_back(a.real); break;
      case edge_kv::Kind::whole: values.emplace_back(a.whole); break;
      case edge_kv::Kind::text:
        texts.emplace_back(a.text, strlen(a.text));
        values.emplace_back(&texts.back());
        break;
      case edge_kv::Kind::list:
        numbers.emplace_back(a.list, a.list + a.length);
        pointers.emplace_back();
        for (EValue& value : numbers.back()) pointers.back().push_back(&value);
        room_of_lists.emplace_back(size_t(a.length) + 1);
        lists.emplace_back(pointers.back().data(), room_of_lists.back().data(), int(a.length));
        values.emplace_back(&lists.back());
        break;
    }
  }
  const int64_t wide = columns(*op, attributes);
  const int64_t most = writes ? 1 : room(inputs, wide);
  const edge_kv::Type kind = writes ? edge_kv::Type::int64 : op->result;
  std::vector<char> memory(size_t(most + 1) * 8);
  int64_t shape[8] = {1, 1, 1, most, 1, 1, 1, 1};
  if (writes) {
    shape[0] = 1;
    add_tensor(ScalarType::Long, memory.data(), 1, shape);
  } else {  // of the rank that the result will have, with room for it
    for (int i = 0; i < 3; ++i) shape[i] = i < inputs[0].rank ? inputs[0].shape[i] : 1;
    if (wide) shape[1] = wide;
    add_tensor(scalar_of(int32_t(kind)), memory.data(), wide ? 2 : inputs[0].rank, shape);
  }
  std::vector<EValue*> stack;
  for (EValue& value : values) stack.push_back(&value);
  stack.push_back(&values.back());  // a program names the result twice
  logged.clear();
  executorch::runtime::KernelRuntimeContext context;
  found.get()(context, {stack.data(), stack.size()});
  if (context.failure_state() != executorch::runtime::Error::Ok) {
    snprintf(why, size_t(size), "%s", logged.c_str());
    return 2;
  }
  const TensorImpl& result = tensors.back().impl;
  outputs[0].type = int32_t(kind);
  outputs[0].rank = int32_t(result.dim());
  for (int i = 0; i < int(result.dim()); ++i) outputs[0].shape[i] = result.size(i);
  const size_t bytes = result.nbytes();
  outputs[0].data = malloc(bytes + 1);
  memcpy(outputs[0].data, memory.data(), bytes);
  return 0;
}
