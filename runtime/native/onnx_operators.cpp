// The functions of an ONNX program (export/onnx_attention.py) as native operators on the kernels.
//
// onnxruntime runs an operator of this library in place of the function of the same name. State is
// written in place where the output is bound to the input's memory, as a session binds it.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "attention.h"
#include "onnx_abi.h"

namespace edge_kv::onnx {
namespace {

const Api* api;  // set when the library is registered, which is before anything else runs

struct Tensor {
  void* data = nullptr;
  int type = kAny;
  std::vector<int64_t> shape;

  const float* floats() const { return static_cast<const float*>(data); }
  int64_t count() const {
    int64_t n = 1;
    for (const int64_t size : shape) n *= size;
    return n;
  }
  int64_t last() const { return shape.empty() ? 1 : shape.back(); }
};

// Thrown inside a kernel, caught at its edge: the rest of onnxruntime knows no exceptions of ours.
struct Failure {
  Status* status;
};

void check(Status* status) {
  if (status) throw Failure{status};
}

void require(bool holds, const char* what) {
  if (!holds) throw Failure{api->CreateStatus(kInvalidArgument, what)};
}

Tensor describe(Value* value) {
  Tensor out;
  Shape* shape;
  check(api->GetTensorTypeAndShape(value, &shape));
  const std::unique_ptr<Shape, void (*)(Shape*)> held(
      shape, [](Shape* s) { api->ReleaseTensorTypeAndShapeInfo(s); });
  size_t rank;
  check(api->GetTensorElementType(shape, &out.type));
  check(api->GetDimensionsCount(shape, &rank));
  out.shape.resize(rank);
  check(api->GetDimensions(shape, out.shape.data(), rank));
  check(api->GetTensorMutableData(value, &out.data));
  return out;
}

Tensor input(Context* context, size_t at, int type) {
  const Value* value;
  check(api->KernelContext_GetInput(context, at, &value));
  Tensor out = describe(const_cast<Value*>(value));
  require(type == kAny || out.type == type, "an input has the wrong type");
  return out;
}

Tensor output(Context* context, size_t at, const std::vector<int64_t>& shape) {
  Value* value;
  check(api->KernelContext_GetOutput(context, at, shape.data(), shape.size(), &value));
  return describe(value);
}

int64_t integer(const Info* info, const char* name) {
  int64_t value;
  check(api->KernelInfoGetAttribute_int64(info, name, &value));
  return value;
}

float real(const Info* info, const char* name) {
  float value;
  check(api->KernelInfoGetAttribute_float(info, name, &value));
  return value;
}

// The session's thread pool, for the kernel that runs on this thread.
thread_local Context* running;

Pool pool_of(Context* context, int threads) {
  running = context;
  return {threads, [](int64_t count, void (*task)(void*, int64_t), void* of) {
            struct Call {
              void (*task)(void*, int64_t);
              void* of;
            } call{task, of};
            check(api->KernelContext_ParallelFor(
                running,
                [](void* c, size_t i) {
                  static_cast<Call*>(c)->task(static_cast<Call*>(c)->of, int64_t(i));
                },
                size_t(count), 0, &call));
          }};
}

size_t bytes_of(int type) {
  switch (type) {
    case kFloat: return 4;
    case kHalf: return 2;
    case kUint8: case kInt8: return 1;
  }
  require(false, "state of this type has no kernel");
  return 0;
}

// Views of keys and values: [1, heads, slots, dim] of a ring, [1, live, dim] of one head.
Buffers buffers_of(const Tensor& keys, const Tensor& values, float* k_scale, float* v_scale) {
  const auto& shape = keys.shape;
  require(shape.size() >= 3 && shape == values.shape, "keys and values are not [1, …, slots, dim]");
  Buffers out{};
  out.keys = keys.data;
  out.values = values.data;
  out.key_scales = k_scale;
  out.value_scales = v_scale;
  out.dim = int(shape.back());
  out.slots = shape[shape.size() - 2];
  out.kv_heads = int(shape.size() == 4 ? shape[1] : 1);
  if (k_scale) {
    require(keys.type == kUint8 && values.type == kInt8, "scales belong to 8-bit rows");
    out.storage = Storage::int8;
    out.key_zero = 128;
  } else {
    require(keys.type == values.type && (keys.type == kFloat || keys.type == kHalf),
            "keys and values are neither float nor half");
    out.storage = keys.type == kFloat ? Storage::f32 : Storage::f16;
  }
  return out;
}

// cos, sin and pos at inputs 3, 4, 5 or 2, 3, 4; the state must hold what the step needs.
Step step_of(Context* context, size_t at, int64_t tokens, const Buffers& buffers, int64_t window,
             float eps) {
  const Tensor cos = input(context, at, kFloat), sin = input(context, at + 1, kFloat);
  const Tensor pos = input(context, at + 2, kInt64);
  require(cos.count() == tokens * buffers.dim / 2 && sin.count() == cos.count() &&
              pos.count() == 1,
          "cos, sin and pos do not belong to the tokens");
  const Step step{cos.floats(), sin.floats(), int(tokens), *static_cast<const int64_t*>(pos.data),
                  eps};
  require(step.position >= 0 && step.seen(window) <= buffers.slots,
          "the state is shorter than what is seen of it");
  return step;
}

// attend_ring, attend_append, attend_append_int8
struct Attend {
  float eps, scale;
  int64_t window;
  int threads;

  Attend(const Info* info, int n_threads, bool ring)
      : eps(real(info, "eps")), scale(real(info, "scale")),
        window(ring ? integer(info, "window") : 0), threads(n_threads) {}

  void run(Context* context, bool scaled) const {
    const Tensor q = input(context, 0, kFloat), norm = input(context, 1, kFloat);
    const Tensor keys = input(context, 5, kAny), values = input(context, 6, kAny);
    float* scales[2] = {};
    for (int i = 0; scaled && i < 2; ++i) {
      const Tensor s = input(context, 7 + i, kFloat);
      require(keys.count() == s.count() * keys.last(), "a row has no scale");
      scales[i] = static_cast<float*>(s.data);
    }
    const Buffers buffers = buffers_of(keys, values, scales[0], scales[1]);
    const int64_t width = int64_t(buffers.kv_heads) * buffers.dim;
    require(q.shape.size() == 2 && q.last() % width == 0 && norm.count() == buffers.dim,
            "queries do not fit the heads of the state");
    const Step step = step_of(context, 2, q.shape[0], buffers, window, eps);
    const Tensor out = output(context, 0, q.shape);
    attend_rows(best_kernels(), pool_of(context, threads), buffers, step, q.floats(),
                int(q.last() / buffers.dim), norm.floats(), window, scale,
                static_cast<float*>(out.data));
  }
};

// store_ring, store_append, store_append_int8
struct Store {
  float eps;
  bool v_norm, ring;
  int threads;

  Store(const Info* info, int n_threads, bool is_ring)
      : eps(real(info, "eps")), v_norm(integer(info, "v_norm")), ring(is_ring),
        threads(n_threads) {}

  void run(Context* context, bool scaled) const {
    const Tensor k = input(context, 0, kFloat), v = input(context, 1, kFloat);
    const Tensor norm = input(context, 2, kFloat);
    Tensor views[4];
    for (int i = 0; i < (scaled ? 4 : 2); ++i) views[i] = kept(context, 6 + i, i);
    const Buffers buffers =
        buffers_of(views[0], views[1], static_cast<float*>(views[2].data),
                   static_cast<float*>(views[3].data));
    const int64_t width = int64_t(buffers.kv_heads) * buffers.dim;
    require(k.shape.size() == 2 && k.last() == width && k.shape == v.shape &&
                norm.count() == buffers.dim,
            "keys and values do not fit the heads of the state");
    // A ring is checked by what reads it; it must take the step's rows themselves.
    const Step step = step_of(context, 3, k.shape[0], buffers, ring ? 1 : 0, eps);
    store_rows(best_kernels(), pool_of(context, threads), buffers, step, k.floats(), v.floats(),
               norm.floats(), v_norm);
  }

  // Output `to` with what input `from` holds: the same memory where it was bound so.
  static Tensor kept(Context* context, size_t from, size_t to) {
    const Tensor old = input(context, from, kAny);
    const Tensor out = output(context, to, old.shape);
    if (out.data != old.data) memcpy(out.data, old.data, size_t(old.count()) * bytes_of(old.type));
    return out;
  }
};

// One operator: what onnxruntime asks of every operator, by the row of the table below.
struct Row : Operator {
  const char* title;
  std::vector<int> inputs, outputs;
  bool ring, scaled;
  int threads;
};

const Row& row(const Operator* op) { return *static_cast<const Row*>(op); }

template <class Kernel>
struct Made {
  Kernel kernel;
  bool scaled;
};

template <class Kernel>
Row make(const char* title, std::vector<int> inputs, std::vector<int> outputs, bool ring,
         bool scaled, int threads) {
  Row r{};
  r.version = kApi;
  r.title = title;
  r.inputs = std::move(inputs);
  r.outputs = std::move(outputs);
  r.ring = ring;
  r.scaled = scaled;
  r.threads = threads;
  r.name = [](const Operator* op) { return row(op).title; };
  r.provider = [](const Operator*) -> const char* { return nullptr; };
  r.input_type = [](const Operator* op, size_t i) { return row(op).inputs[i]; };
  r.input_count = [](const Operator* op) { return row(op).inputs.size(); };
  r.output_type = [](const Operator* op, size_t i) { return row(op).outputs[i]; };
  r.output_count = [](const Operator* op) { return row(op).outputs.size(); };
  r.input_characteristic = r.output_characteristic = [](const Operator*, size_t) { return 0; };
  r.input_memory = [](const Operator*, size_t) { return 0; };
  r.variadic_input_arity = r.variadic_output_arity = [](const Operator*) { return 1; };
  r.variadic_input_homogeneity = r.variadic_output_homogeneity = [](const Operator*) { return 1; };
  r.first_version = r.last_version = [](const Operator*) { return 1; };
  r.create = [](const Operator* op, const void* const*, const Info* info, void** kernel) {
    try {
      *kernel = new Made<Kernel>{Kernel(info, row(op).threads, row(op).ring), row(op).scaled};
      return static_cast<Status*>(nullptr);
    } catch (const Failure& failure) {
      return failure.status;
    }
  };
  r.run = [](void* kernel, Context* context) {
    const auto* made = static_cast<Made<Kernel>*>(kernel);
    try {
      made->kernel.run(context, made->scaled);
      return static_cast<Status*>(nullptr);
    } catch (const Failure& failure) {
      return failure.status;
    } catch (const std::bad_alloc&) {
      return api->CreateStatus(1, "Failed to allocate memory");
    }
  };
  r.destroy = [](void* kernel) { delete static_cast<Made<Kernel>*>(kernel); };
  return r;
}

// An operator is a row for each type of its state: onnxruntime picks the one that fits.
std::vector<Row> operators(int threads) {
  const int f = kFloat, p = kInt64, u = kUint8, s = kInt8;
  std::vector<Row> rows = {
      make<Attend>("attend_append_int8", {f, f, f, f, p, u, s, f, f}, {f}, false, true, threads),
      make<Store>("store_append_int8", {f, f, f, f, f, p, u, s, f, f}, {u, s, f, f}, false, true,
                  threads),
  };
  for (const int t : {int(kFloat), int(kHalf)}) {
    rows.push_back(make<Attend>("attend_ring", {f, f, f, f, p, t, t}, {f}, true, false, threads));
    rows.push_back(
        make<Attend>("attend_append", {f, f, f, f, p, t, t}, {f}, false, false, threads));
    rows.push_back(
        make<Store>("store_ring", {f, f, f, f, f, p, t, t}, {t, t}, true, false, threads));
    rows.push_back(
        make<Store>("store_append", {f, f, f, f, f, p, t, t}, {t, t}, false, false, threads));
  }
  return rows;
}

}  // namespace

Status* add_old_operators(const Api& of, int threads, Domain* domain) {
  api = &of;
  // Sessions refer to their operators for as long as the process lives.
  auto* rows = new std::vector<Row>(operators(threads));
  for (const Row& r : *rows)
    if (Status* status = api->CustomOpDomain_Add(domain, &r)) return status;
  return nullptr;
}

}  // namespace edge_kv::onnx
