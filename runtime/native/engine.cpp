#include "engine.h"

#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/extension/threadpool/threadpool_guard.h>
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "kernels.h"
#include "running.h"
#include "weight_file.h"

namespace executorch::extension::threadpool {
// Declared here because the wheel ships the library without this header.
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::extension::MallocMemoryAllocator;
using executorch::extension::MmapDataLoader;
using namespace executorch::runtime;

constexpr char kXnnpack[] = "XnnpackBackend";
constexpr char kState[] = "state.";
constexpr const char* kMethods[] = {"prefill", "decode"};
constexpr char kDraft[] = "draft";

// Anonymous pages: they cost nothing until they are written.
class Arena {
 public:
  explicit Arena(size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at != MAP_FAILED) data_ = static_cast<uint8_t*>(at);
  }
  ~Arena() {
    if (data_) munmap(data_, bytes_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  bool ok() const { return data_ || bytes_ == 0; }
  uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_;
  uint8_t* data_ = nullptr;
};

// One input of a method, over the caller's memory.
class Input {
 public:
  Input(ScalarType type, const void* data, std::initializer_list<int64_t> sizes) {
    for (int64_t size : sizes) sizes_[dim_++] = int32_t(size);
    for (int i = dim_ - 1, stride = 1; i >= 0; stride *= sizes_[i--]) {
      order_[i] = uint8_t(i);
      strides_[i] = stride;
    }
    impl_.emplace(type, dim_, sizes_, const_cast<void*>(data), order_, strides_);
  }
  EValue value() { return EValue(Tensor(&*impl_)); }

 private:
  int dim_ = 0;
  int32_t sizes_[3];
  uint8_t order_[3];
  int32_t strides_[3];
  std::optional<TensorImpl> impl_;
};

struct LoadedMethod {
  std::vector<Span<uint8_t>> spans;
  std::optional<HierarchicalAllocator> planned;
  std::optional<MemoryManager> memory;
  std::optional<Method> method;
  int64_t ple_layers = 0, ple_dim = 0;  // shape of one token's rows; 0 when it takes none
};

// ExecuTorch logs why something failed and returns only a code: keep the first reason, and spare
// the user the rest of the log.
std::mutex reason_lock;
std::string reason;

void keep_reason(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t,
                 const char* message, size_t length) {
  if (level != et_pal_log_level_t::kError && level != et_pal_log_level_t::kFatal) return;
  const std::lock_guard<std::mutex> hold(reason_lock);
  if (reason.empty()) reason.assign(message, length);
  if (level == et_pal_log_level_t::kFatal) fprintf(stderr, "ExecuTorch: %.*s\n", int(length), message);
}

void forget_reason() {
  const std::lock_guard<std::mutex> hold(reason_lock);
  reason.clear();
}

std::string said(const std::string& what, Error error) {
  const std::lock_guard<std::mutex> hold(reason_lock);
  return what + ": " + (reason.empty() ? to_string(error) : reason);
}

int fail(char* error, int error_bytes, const std::string& what) {
  if (error && error_bytes > 0) snprintf(error, size_t(error_bytes), "%s", what.c_str());
  return 1;
}

const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float";
    case ScalarType::Half: return "float16";
    case ScalarType::Char: return "int8";
    case ScalarType::Long: return "int64";
    default: return "other";
  }
}

// Tell the kernel that rows of this file are read in no order: no read-ahead for table look-ups.
void advise_random(const std::string& path) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.size() < path.size() ||
        line.compare(line.size() - path.size(), path.size(), path) != 0)
      continue;
    unsigned long long begin = 0, end = 0;
    if (sscanf(line.c_str(), "%llx-%llx", &begin, &end) == 2)
      madvise(reinterpret_cast<void*>(begin), size_t(end - begin), MADV_RANDOM);
  }
}

}  // namespace

struct edge_kv_engine {
  edge_kv_engine(int threads, bool exact) : running{&workers, threads, exact} {}

  edge_kv::Workers workers;
  edge_kv::Running running;
  edge_kv::WeightFile weights;
  std::optional<MmapDataLoader> loader;
  std::optional<Program> program;
  MallocMemoryAllocator method_memory, temporary_memory;
  std::vector<std::unique_ptr<Arena>> arenas;
  bool delegated = false;  // to XNNPACK, which runs on threads of the process
  LoadedMethod prefill, decode, draft;
  std::vector<EValue> drafted_from;  // the state buffers that `draft` reads

  std::string open(const std::string& path, const std::string& weight_file);
  void reserve(const MethodMeta& meta);  // arenas that hold what a method plans
  std::string load(const char* name, LoadedMethod& into);
  std::string run(LoadedMethod& m, const int64_t* ids, int64_t count, int64_t pos, const float* ple);
  std::string execute(Method& method, const EValue* inputs, size_t count);
  std::string load_draft(const std::string& tables);
  std::string run_draft(int64_t id, int64_t pos, const float* hidden, int64_t width);
  std::string describe() const;
};

std::string edge_kv_engine::open(const std::string& path, const std::string& weight_file) {
  forget_reason();
  // Never mlock: as root that would pin every lookup table in memory.
  auto file = MmapDataLoader::from(path.c_str(), MmapDataLoader::MlockConfig::NoMlock);
  if (!file.ok()) return said("the file cannot be mapped", file.error());
  loader.emplace(std::move(file.get()));
  auto parsed = Program::load(&*loader, Program::Verification::InternalConsistency);
  if (!parsed.ok()) return said("it is not a .pte of this ExecuTorch", parsed.error());
  program.emplace(std::move(parsed.get()));
  if (!weight_file.empty()) {
    const std::string fault = weights.map(weight_file);
    if (!fault.empty()) return fault;
    const int64_t wanted = edge_kv_fact(this, "edge_kv_weights", 0);
    if (weights.bytes() != wanted)
      return "it is for weights of " + std::to_string(wanted) + " bytes, " + weight_file + " has " +
             std::to_string(weights.bytes());
  }

  for (const char* name : kMethods) {
    auto meta = program->method_meta(name);
    if (!meta.ok()) return std::string("it has no method ") + name;
    reserve(*meta);
    delegated = delegated || meta->uses_backend(kXnnpack);
  }
  if (auto meta = program->method_meta(kDraft); meta.ok()) reserve(*meta);
  for (const auto& arena : arenas)
    if (!arena->ok()) return "out of memory for its planned buffers";
  if (delegated) {
    auto* pool = executorch::extension::threadpool::get_threadpool();
    if (pool && pool->get_thread_count() != size_t(running.threads))
      pool->_unsafe_reset_threadpool(uint32_t(running.threads));
  }
  std::string fault = load("prefill", prefill);
  if (fault.empty()) fault = load("decode", decode);
  if (fault.empty() &&
      (prefill.ple_dim != decode.ple_dim || prefill.ple_layers > decode.ple_layers))
    return "its methods take different per-layer rows";
  if (fault.empty() && weight_file.empty()) advise_random(path);
  return fault;
}

void edge_kv_engine::reserve(const MethodMeta& meta) {
  for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
    const size_t bytes = size_t(meta.memory_planned_buffer_size(i).get());
    if (i == arenas.size()) arenas.push_back(std::make_unique<Arena>(bytes));
    else if (arenas[i]->size() < bytes) arenas[i] = std::make_unique<Arena>(bytes);
  }
}

std::string edge_kv_engine::load(const char* name, LoadedMethod& into) {
  auto meta = program->method_meta(name);
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const size_t bytes = size_t(meta->memory_planned_buffer_size(i).get());
    if (i >= arenas.size() || bytes > arenas[i]->size())
      return std::string(name) + " plans more memory than the other methods";
    into.spans.push_back({arenas[i]->data(), bytes});
  }
  into.planned.emplace(Span<Span<uint8_t>>(into.spans.data(), into.spans.size()));
  into.memory.emplace(&method_memory, &*into.planned, &temporary_memory);
  if (&into != &draft && meta->num_inputs() > 2) {
    auto ple = meta->input_tensor_meta(2);
    if (!ple.ok() || ple->sizes().size() != 3) return std::string(name) + " has unknown inputs";
    into.ple_layers = ple->sizes()[1];
    into.ple_dim = ple->sizes()[2];
  }
  BackendOptions<1> xnnpack;
  LoadBackendOptionsMap options;
  // Both methods use the same weights: pack them once.
  if (xnnpack.set_option("weight_cache_enabled", true) != Error::Ok ||
      options.set_options(kXnnpack, xnnpack.view()) != Error::Ok)
    return "XNNPACK refused its options";
  const NamedDataMap* constants = weights.bytes() ? &weights : nullptr;
  auto loaded = program->load_method(name, &*into.memory, nullptr, constants, &options);
  if (!loaded.ok())
    return weights.fault().empty() ? said(std::string("method ") + name, loaded.error())
                                   : weights.fault();
  into.method.emplace(std::move(loaded.get()));
  return "";
}

std::string edge_kv_engine::load_draft(const std::string& tables) {
  if (!program->method_meta(kDraft).ok()) return std::string("it has no method ") + kDraft;
  std::string fault = load(kDraft, draft);
  if (!fault.empty()) return fault;
  std::istringstream names(tables);
  for (std::string name; std::getline(names, name);) {
    auto buffer = decode.method->get_attribute(name);
    if (!buffer.ok()) return "it holds no state " + name;
    drafted_from.push_back(EValue(*buffer));
  }
  return draft.method->inputs_size() == 3 + drafted_from.size()
             ? ""
             : std::string(kDraft) + " reads other state than it should";
}

std::string edge_kv_engine::run_draft(int64_t id, int64_t pos, const float* hidden, int64_t width) {
  Input token(ScalarType::Long, &id, {1}), position(ScalarType::Long, &pos, {1});
  Input state(ScalarType::Float, hidden, {1, width});
  std::vector<EValue> inputs = {token.value(), position.value(), state.value()};
  inputs.insert(inputs.end(), drafted_from.begin(), drafted_from.end());
  return execute(*draft.method, inputs.data(), inputs.size());
}

std::string edge_kv_engine::describe() const {
  std::string text;
  std::vector<const char*> names(std::begin(kMethods), std::end(kMethods));
  if (draft.method) names.push_back(kDraft);
  for (const char* name : names) {
    const auto meta = program->method_meta(name);
    const auto add = [&](const char* what, const Result<TensorInfo>& tensor) {
      text += std::string(name) + " " + what;
      if (!tensor.ok()) {
        text += " unknown\n";
        return;
      }
      if (!tensor->name().empty()) text += " " + std::string(tensor->name());
      text += " " + std::string(type_name(tensor->scalar_type()));
      for (const int32_t size : tensor->sizes()) text += " " + std::to_string(size);
      text += "\n";
    };
    for (size_t i = 0; i < meta->num_inputs(); ++i) add("input", meta->input_tensor_meta(i));
    for (size_t i = 0; i < meta->num_outputs(); ++i) add("output", meta->output_tensor_meta(i));
    for (size_t i = 0; i < meta->num_attributes(); ++i) {
      const auto attribute = meta->attribute_tensor_meta(i);  // state, or a weight by its key
      if (attribute.ok() && attribute->name().rfind(kState, 0) == 0) add("state", attribute);
    }
  }
  return text;
}

std::string edge_kv_engine::run(LoadedMethod& m, const int64_t* ids, int64_t count, int64_t pos,
                                const float* ple) {
  if (m.ple_dim && !ple) return "the per-layer rows are missing";
  Input tokens(ScalarType::Long, ids, {count}), position(ScalarType::Long, &pos, {1});
  Input rows(ScalarType::Float, ple, {count, m.ple_layers, m.ple_dim});
  const EValue inputs[] = {tokens.value(), position.value(), rows.value()};
  return execute(*m.method, inputs, m.ple_dim ? 3 : 2);
}

std::string edge_kv_engine::execute(Method& method, const EValue* inputs, size_t count) {
  forget_reason();
  const edge_kv::Turn turn(running);
  // Stock operators stay on this thread, unless XNNPACK's threads are in use anyway.
  std::optional<executorch::extension::threadpool::NoThreadPoolGuard> alone;
  if (!delegated) alone.emplace();
  for (size_t i = 0; i < count; ++i) {
    const Error error = method.set_input(inputs[i], i);
    if (error != Error::Ok) return said("an input was refused", error);
  }
  const Error error = method.execute();
  return error == Error::Ok ? "" : said("execution failed", error);
}

extern "C" {

edge_kv_engine* edge_kv_open(const char* program, const char* weights, int threads, int exact,
                             char* error, int error_bytes) {
  static const bool ready = [] {
    runtime_init();
    return register_pal(PalImpl::create(keep_reason, __FILE__));
  }();
  if (!ready) {
    fail(error, error_bytes, "ExecuTorch's log cannot be taken over");
    return nullptr;
  }
  auto engine = std::make_unique<edge_kv_engine>(std::max(1, threads), exact != 0);
  const std::string fault = engine->open(program, weights);
  if (fault.empty()) return engine.release();
  fail(error, error_bytes, fault);
  return nullptr;
}

void edge_kv_close(edge_kv_engine* engine) { delete engine; }

int64_t edge_kv_describe(edge_kv_engine* engine, char* text, int64_t bytes) {
  const std::string said = engine->describe();
  memcpy(text, said.data(), size_t(std::min(bytes, int64_t(said.size()))));
  return int64_t(said.size());
}

void* edge_kv_buffer(edge_kv_engine* engine, const char* name, int64_t* bytes) {
  auto buffer = engine->decode.method->get_attribute(name);
  if (!buffer.ok()) return nullptr;
  *bytes = int64_t(buffer->nbytes());
  return buffer->mutable_data_ptr();
}

int64_t edge_kv_fact(edge_kv_engine* engine, const char* name, int64_t otherwise) {
  LoadedMethod constant;
  if (!engine->program->method_meta(name).ok()) return otherwise;
  if (!engine->load(name, constant).empty()) return otherwise;
  if (constant.method->execute() != Error::Ok) return otherwise;
  const EValue& value = constant.method->get_output(0);
  return value.isInt() ? value.toInt() : otherwise;
}

int edge_kv_prefill(edge_kv_engine* engine, const int64_t* ids, int64_t count, int64_t pos,
                    const float* ple, char* error, int error_bytes) {
  const std::string fault = engine->run(engine->prefill, ids, count, pos, ple);
  return fault.empty() ? 0 : fail(error, error_bytes, fault);
}

int edge_kv_decode(edge_kv_engine* engine, const int64_t* ids, int64_t count, int64_t pos,
                   const float* ple, float* logits, int64_t vocab, char* error, int error_bytes) {
  const std::string fault = engine->run(engine->decode, ids, count, pos, ple);
  if (!fault.empty()) return fail(error, error_bytes, fault);
  const Tensor out = engine->decode.method->get_output(0).toTensor();
  if (out.numel() != count * vocab) return fail(error, error_bytes, "it has another vocabulary");
  memcpy(logits, out.const_data_ptr<float>(), size_t(count * vocab) * sizeof(float));
  return 0;
}

int edge_kv_load_draft(edge_kv_engine* engine, const char* tables, char* error, int error_bytes) {
  const std::string fault = engine->load_draft(tables);
  return fault.empty() ? 0 : fail(error, error_bytes, fault);
}

int edge_kv_hidden(edge_kv_engine* engine, float* hidden, int64_t values, char* error,
                   int error_bytes) {
  const Method& decode = *engine->decode.method;
  if (decode.outputs_size() < 2) return fail(error, error_bytes, "it returns no hidden states");
  const Tensor out = decode.get_output(1).toTensor();
  if (out.numel() != values) return fail(error, error_bytes, "its hidden states are of another width");
  memcpy(hidden, out.const_data_ptr<float>(), size_t(values) * sizeof(float));
  return 0;
}

int edge_kv_draft(edge_kv_engine* engine, int64_t id, int64_t pos, const float* hidden, float* carry,
                  int64_t width, float* logits, int64_t* tokens, int64_t scored, char* error,
                  int error_bytes) {
  const std::string fault = engine->run_draft(id, pos, hidden, width);
  if (!fault.empty()) return fail(error, error_bytes, fault);
  const Method& draft = *engine->draft.method;
  const Tensor scores = draft.get_output(0).toTensor(), next = draft.get_output(1).toTensor();
  if (scores.numel() != scored || next.numel() != width || draft.outputs_size() != (tokens ? 3 : 2))
    return fail(error, error_bytes, "its drafts have another shape");
  memcpy(logits, scores.const_data_ptr<float>(), size_t(scored) * sizeof(float));
  memcpy(carry, next.const_data_ptr<float>(), size_t(width) * sizeof(float));
  if (tokens) {
    const Tensor which = draft.get_output(2).toTensor();
    if (which.numel() != scored) return fail(error, error_bytes, "its drafts have another shape");
    memcpy(tokens, which.const_data_ptr<int64_t>(), size_t(scored) * sizeof(int64_t));
  }
  return 0;
}

const char* edge_kv_isa(void) { return edge_kv::best_kernels().name; }

}  // extern "C"
