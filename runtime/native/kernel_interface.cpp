// The kernels behind a plain C function, on threads of their own: for tests and measurements.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "parallel.h"
#include "fused.h"
#include "ops.h"
#include "pool.h"
#include "weights.h"

namespace {

thread_local int wanted_threads = 1;

void run_on_threads(int64_t count, void (*task)(void*, int64_t), void* context) {
  static edge_kv::Workers workers;
  workers.run(wanted_threads, count, task, context);
}

}  // namespace

#define EDGE_KV_API extern "C" __attribute__((visibility("default")))

// A tensor; `type` as Type of ops.h, 0 where an optional input is left out. An output is made in the
// memory that its data points to, or where that is null in memory that is given back with free().
struct edge_kv_tensor {
  void* data;
  int32_t type, rank;
  int64_t shape[8];
};

struct edge_kv_attribute {
  double real;
  int64_t whole;
  const int64_t* list;
  int64_t length;
  const char* text;
};

namespace {

class TensorCall : public edge_kv::Call {
 public:
  TensorCall(const edge_kv::Kernels& of, const edge_kv::Pool& on, const edge_kv::View* inputs,
             const edge_kv::Attribute* values, edge_kv_tensor* outputs)
      : Call(of, on, inputs, values), outputs_(outputs) {}

  edge_kv::View output(int at, edge_kv::Type type, std::initializer_list<int64_t> shape) override {
    return make(outputs_[at], type, shape.begin(), int(shape.size()));
  }
  edge_kv::View output_like(int at, const edge_kv::View& like) override {
    return make(outputs_[at], like.type, like.shape, like.rank);
  }

 private:
  static edge_kv::View make(edge_kv_tensor& to, edge_kv::Type type, const int64_t* shape,
                            int rank) {
    to.type = int32_t(type);
    to.rank = rank;
    std::copy_n(shape, rank, to.shape);
    edge_kv::View view{nullptr, type, rank, to.shape};
    if (!to.data) to.data = malloc(size_t(view.count()) * edge_kv::bytes_of(type));
    view.data = to.data;
    return view;
  }

  edge_kv_tensor* outputs_;
};

}  // namespace

// Run an operator of ops.h by name: its inputs and attributes in order, tables written in place.
// Returns 0, 1 where there are no such kernels or no such operator, or 2 with the reason in `why`.
EDGE_KV_API int edge_kv_call(const char* isa, int threads, const char* name,
                             const edge_kv_tensor* inputs, const edge_kv_attribute* attributes,
                             edge_kv_tensor* outputs, char* why, int64_t size) {
  const edge_kv::Kernels* kernels = edge_kv::find_kernels(isa);
  const edge_kv::Operator* op = nullptr;
  for (const edge_kv::Operator& of : edge_kv::kOperators)
    if (!strcmp(of.name, name)) op = &of;
  if (!kernels || !op) return 1;
  edge_kv::View views[edge_kv::kMostInputs];
  for (int i = 0; i < op->input_count(); ++i) {
    const edge_kv_tensor& t = inputs[i];
    views[i] = {t.data, edge_kv::Type(t.type), t.rank, t.shape};
  }
  edge_kv::Attribute values[edge_kv::kMostParameters];
  for (int i = 0; i < op->parameter_count(); ++i) {
    const edge_kv_attribute& a = attributes[i];
    values[i] = {a.real, a.whole, a.list, size_t(a.length), a.text ? a.text : ""};
  }
  wanted_threads = threads;
  const edge_kv::Pool pool{threads, run_on_threads};
  TensorCall call(*kernels, pool, views, values, outputs);
  const std::string reason = edge_kv::invoke(*op, call);
  if (reason.empty()) return 0;
  snprintf(why, size_t(size), "%s", reason.c_str());
  return 2;
}

// linear_q; 2: no such format.
EDGE_KV_API int edge_kv_linear_q(const char* isa, int threads, const char* format, const float* x,
                                 int64_t tokens, const uint8_t* data, int64_t rows, int64_t cols,
                                 float step, float* out) {
  const edge_kv::Kernels* kernels = edge_kv::find_kernels(isa);
  const edge_kv::Format* found = edge_kv::find_format(format);
  if (!kernels || !found) return kernels ? 2 : 1;
  wanted_threads = threads;
  edge_kv::linear_q(*kernels, {threads, run_on_threads}, x, tokens, {found, data, rows, cols}, step,
                    out);
  return 0;
}

EDGE_KV_API void edge_kv_embed_row(const char* format, const uint8_t* data, int64_t rows,
                                   int64_t cols, int64_t row, float* out) {
  edge_kv::embed_row({edge_kv::find_format(format), data, rows, cols}, row, out);
}

EDGE_KV_API int64_t edge_kv_weight_bytes(const char* format, int64_t rows, int64_t cols) {
  const edge_kv::Format* found = edge_kv::find_format(format);
  return found ? edge_kv::weight_bytes(*found, rows, cols) : -1;
}

EDGE_KV_API int edge_kv_gelu_times(const char* isa, int threads, const float* gate, const float* up,
                                   int64_t count, float* out) {
  const edge_kv::Kernels* kernels = edge_kv::find_kernels(isa);
  if (!kernels) return 1;
  wanted_threads = threads;
  edge_kv::gated_values(*kernels, {threads, run_on_threads}, gate, up, count,
                        edge_kv::Activation::gelu_tanh, 0.0f, out);
  return 0;
}

EDGE_KV_API int edge_kv_softcap(const char* isa, int threads, const float* x, int64_t count,
                                float cap, float* out) {
  const edge_kv::Kernels* kernels = edge_kv::find_kernels(isa);
  if (!kernels) return 1;
  wanted_threads = threads;
  edge_kv::softcap(*kernels, {threads, run_on_threads}, x, count, cap, out);
  return 0;
}

EDGE_KV_API int edge_kv_norm_rows(const char* isa, int threads, const float* x, int64_t rows,
                                  int64_t dim, const float* weight, float eps, float* out) {
  const edge_kv::Kernels* kernels = edge_kv::find_kernels(isa);
  if (!kernels) return 1;
  wanted_threads = threads;
  edge_kv::norm_rows(*kernels, {threads, run_on_threads}, x, rows, dim, weight, eps, out);
  return 0;
}

EDGE_KV_API int edge_kv_linear_float(const char* isa, int threads, const float* x, int64_t tokens,
                                     const float* rows, int64_t n_out, int64_t n_in, float* out) {
  const edge_kv::Kernels* kernels = edge_kv::find_kernels(isa);
  if (!kernels) return 1;
  wanted_threads = threads;
  edge_kv::linear_float(*kernels, {threads, run_on_threads}, x, tokens, rows, n_out, n_in, out);
  return 0;
}
