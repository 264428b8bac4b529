// The operators of ops.h for onnxruntime, which runs them in place of functions of the same names.
//
// A table that an operator writes is written in place where its output is bound to the memory of
// its input, as a session binds it; elsewhere it is copied first.
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "onnx_abi.h"
#include "ops.h"

namespace edge_kv::onnx {

namespace {

using Node = edge_kv::Operator;
using Entry = onnx::Operator;  // what onnxruntime asks of an operator

const Api* api;  // set when the library is registered, which is before anything else runs
constexpr size_t kMostAxes = 8, kMostListed = 16, kMostText = 64;

// Thrown inside a kernel, caught at its edge: the rest of onnxruntime knows no exceptions of ours.
struct Failure {
  Status* status;
};

void check(Status* status) {
  if (status) throw Failure{status};
}

Type type_of(int element) {
  switch (element) {
    case kFloat: return Type::f32;
    case kHalf: return Type::f16;
    case kInt8: return Type::int8;
    case kUint8: return Type::uint8;
    case kInt64: return Type::int64;
  }
  return Type::other;
}

int element_of(Type type) {
  switch (type) {
    case Type::f32: return kFloat;
    case Type::f16: return kHalf;
    case Type::int8: return kInt8;
    case Type::uint8: return kUint8;
    case Type::int64: return kInt64;
    case Type::none: case Type::other: break;
  }
  return kAny;
}

struct Tensor : View {
  int64_t axes[kMostAxes];
};

void describe(Value* value, Tensor& out) {
  Shape* shape;
  check(api->GetTensorTypeAndShape(value, &shape));
  const std::unique_ptr<Shape, void (*)(Shape*)> held(
      shape, [](Shape* s) { api->ReleaseTensorTypeAndShapeInfo(s); });
  int element;
  size_t rank;
  check(api->GetTensorElementType(shape, &element));
  check(api->GetDimensionsCount(shape, &rank));
  if (rank > kMostAxes) throw Failure{api->CreateStatus(kInvalidArgument, "too many axes")};
  check(api->GetDimensions(shape, out.axes, rank));
  check(api->GetTensorMutableData(value, &out.data));
  out.type = type_of(element);
  out.rank = int(rank);
  out.shape = out.axes;
}

// The session's thread pool, for the kernel that runs on this thread.
thread_local Context* running;

Pool pool_of(Context* context, int threads) {
  running = context;
  return {threads, [](int64_t count, void (*task)(void*, int64_t), void* of) {
            struct Job {
              void (*task)(void*, int64_t);
              void* of;
            } job{task, of};
            check(api->KernelContext_ParallelFor(
                running,
                [](void* j, size_t i) {
                  static_cast<Job*>(j)->task(static_cast<Job*>(j)->of, int64_t(i));
                },
                size_t(count), 0, &job));
          }};
}

class OnnxCall : public Call {
 public:
  OnnxCall(Context* context, const Pool& on, const View* inputs, const Attribute* values)
      : Call(best_kernels(), on, inputs, values), context_(context) {}

  View output(int at, Type, std::initializer_list<int64_t> shape) override {
    return make(size_t(at), shape.begin(), shape.size());
  }
  View output_like(int at, const View& like) override {
    return make(size_t(at), like.shape, size_t(like.rank));
  }

 private:
  View make(size_t at, const int64_t* shape, size_t rank) {
    Value* value;
    View out;
    check(api->KernelContext_GetOutput(context_, at, shape, rank, &value));
    check(api->GetTensorMutableData(value, &out.data));
    return out;
  }

  Context* context_;
};

// How a session runs its operators.
struct Way {
  int threads;
  bool exact;  // see Call

  bool operator<(const Way& other) const {
    return std::tie(threads, exact) < std::tie(other.threads, other.exact);
  }
};

// An operator of the list for one type of the tables that it writes.
struct Row : Entry {
  const Node* node;
  Type table;
  Way way;
};

const Row& row(const Entry* op) { return *static_cast<const Row*>(op); }

// A node of a program: its operator and its attributes.
class Kernel {
 public:
  Kernel(const Row& of, const Info* info) : row_(of), values_(of.node->parameter_count()) {
    lists_.reserve(values_.size());
    texts_.reserve(values_.size());
    for (size_t i = 0; i < values_.size(); ++i) {
      const Parameter& parameter = row_.node->parameters[i];
      Attribute& value = values_[i];
      float real;
      switch (parameter.kind) {
        case Kind::real: {
          Status* const missing = api->KernelInfoGetAttribute_float(info, parameter.name, &real);
          if (missing && parameter.optional) {
            api->ReleaseStatus(missing);
            break;
          }
          check(missing);
          value.real = double(real);
          break;
        }
        case Kind::whole:
          check(api->KernelInfoGetAttribute_int64(info, parameter.name, &value.whole));
          break;
        case Kind::list: {
          size_t length = kMostListed;
          std::vector<int64_t> list(length);
          check(api->KernelInfoGetAttributeArray_int64(info, parameter.name, list.data(), &length));
          lists_.push_back(std::move(list));
          value.list = lists_.back().data();
          value.length = length;
          break;
        }
        case Kind::text: {
          size_t length = kMostText;  // with its end
          std::string text(length, '\0');
          check(api->KernelInfoGetAttribute_string(info, parameter.name, text.data(), &length));
          text.resize(length ? length - 1 : 0);
          texts_.push_back(std::move(text));
          value.text = texts_.back();
          break;
        }
      }
    }
  }

  void run(Context* context) const {
    Tensor inputs[kMostInputs];
    View views[kMostInputs];
    size_t given;
    check(api->KernelContext_GetInputCount(context, &given));
    const int count = row_.node->input_count();
    for (int i = 0; i < count && size_t(i) < given; ++i) {
      const Value* value = nullptr;
      check(api->KernelContext_GetInput(context, size_t(i), &value));
      if (!value) continue;
      describe(const_cast<Value*>(value), inputs[i]);
      views[i] = inputs[i];
    }
    const Pool pool = pool_of(context, row_.way.threads);
    OnnxCall call(context, pool, views, values_.data());
    call.exact = row_.way.exact;
    size_t output = 0;
    for (int i = 0; i < count; ++i)
      if (row_.node->inputs[i].written && views[i]) keep(call, output++, views[i]);
    const std::string why = invoke(*row_.node, call);
    if (!why.empty()) throw Failure{api->CreateStatus(kInvalidArgument, why.c_str())};
  }

 private:
  // Make `view` the memory of an output that holds what the view held.
  static void keep(OnnxCall& call, size_t output, View& view) {
    const View out = call.output_like(int(output), view);
    if (out.data != view.data)
      memcpy(out.data, view.data, size_t(view.count()) * bytes_of(view.type));
    view.data = out.data;
  }

  const Row& row_;
  std::vector<Attribute> values_;
  std::vector<std::vector<int64_t>> lists_;
  std::vector<std::string> texts_;
};

bool writes(const Node& node) { return node.result == Type::none; }

// The input behind output `at` of an operator that writes tables.
const Input& written(const Node& node, size_t at) {
  const Input* input = node.inputs;
  while (!input->written || at-- > 0) ++input;
  return *input;
}

Row make(const Node& node, Type table, Way way) {
  Row r{};
  r.version = kApi;
  r.node = &node;
  r.table = table;
  r.way = way;
  r.name = [](const Entry* op) { return row(op).node->name; };
  r.provider = [](const Entry*) -> const char* { return nullptr; };
  r.input_count = [](const Entry* op) { return size_t(row(op).node->input_count()); };
  r.input_type = [](const Entry* op, size_t i) {
    const Input& input = row(op).node->inputs[i];
    return element_of(input.type == Type::other && input.written ? row(op).table : input.type);
  };
  r.output_count = [](const Entry* op) {
    size_t count = 0;
    for (const Input* input = row(op).node->inputs; input->name; ++input) count += input->written;
    return writes(*row(op).node) ? count : 1;
  };
  r.output_type = [](const Entry* op, size_t i) {
    return writes(*row(op).node) ? row(op).input_type(op, i) : element_of(row(op).node->result);
  };
  r.input_characteristic = [](const Entry* op, size_t i) {
    return int(row(op).node->inputs[i].optional);
  };
  r.output_characteristic = [](const Entry* op, size_t i) {
    return int(writes(*row(op).node) && written(*row(op).node, i).optional);
  };
  r.input_memory = [](const Entry*, size_t) { return 0; };
  r.variadic_input_arity = r.variadic_output_arity = [](const Entry*) { return 1; };
  r.variadic_input_homogeneity = r.variadic_output_homogeneity = [](const Entry*) { return 1; };
  r.first_version = r.last_version = [](const Entry*) { return 1; };
  r.create = [](const Entry* op, const void* const*, const Info* info, void** kernel) {
    try {
      *kernel = new Kernel(row(op), info);
      return static_cast<Status*>(nullptr);
    } catch (const Failure& failure) {
      return failure.status;
    }
  };
  r.run = [](void* kernel, Context* context) {
    try {
      static_cast<const Kernel*>(kernel)->run(context);
      return static_cast<Status*>(nullptr);
    } catch (const Failure& failure) {
      return failure.status;
    }
  };
  r.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return r;
}

// An operator that writes tables is a row for each type of table: onnxruntime takes the type of an
// output from its row.
std::vector<Row> rows_of(Way way) {
  std::vector<Row> rows;
  for (const Node& node : kOperators) {
    if (!writes(node)) rows.push_back(make(node, Type::other, way));
    for (const Type table : {Type::f32, Type::f16, Type::int8})
      if (writes(node)) rows.push_back(make(node, table, way));
  }
  return rows;
}

// The operators for sessions that run them this way; made once, since sessions refer to them for as
// long as they live.
Domain* domain_of(Way way) {
  static std::mutex mutex;
  static std::map<Way, std::pair<std::vector<Row>, Domain*>> made;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = made.find(way);
  if (found != made.end()) return found->second.second;
  Domain* domain;
  check(api->CreateCustomOpDomain("edge_kv", &domain));
  auto& held = made[way] = {rows_of(way), domain};
  for (const Row& r : held.first) check(api->CustomOpDomain_Add(domain, &r));
  return domain;
}

// A number among a session's options, 0 where it is not given.
int option(const SessionOptions* options, const char* key) {
  char text[16] = "0";
  size_t size = sizeof text;
  int given;
  check(api->HasSessionConfigEntry(options, key, &given));
  if (given) check(api->GetSessionConfigEntry(options, key, text, &size));
  return atoi(text);
}

}  // namespace

// Called by onnxruntime for every session that the library is given to. The session's options
// carry how its operators run, since an operator cannot ask for it: "edge_kv.threads" (1 without it)
// and "edge_kv.exact", for products of activations that are not rounded.
extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(
    SessionOptions* options, const ApiBase* base) {
  static const Api table{base->get_api(kApi)};
  api = &table;
  try {
    const Way way{std::max(1, option(options, "edge_kv.threads")), option(options, "edge_kv.exact") > 0};
    check(api->AddCustomOpDomain(options, domain_of(way)));
  } catch (const Failure& failure) {
    return failure.status;
  }
  return nullptr;
}

}  // namespace edge_kv::onnx
