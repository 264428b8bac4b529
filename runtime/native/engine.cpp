#include "engine.h"

#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
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
#include <string>
#include <vector>

#include "kernels.h"

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

constexpr size_t kStateArena = 1;  // arena 0 holds activations, arena 1 the shared state

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
  std::optional<MmapDataLoader> loader;
  std::optional<Program> program;
  MallocMemoryAllocator method_memory, temporary_memory;
  std::vector<std::unique_ptr<Arena>> arenas;
  LoadedMethod prefill, decode;

  std::string open(const std::string& path, const std::string& packed_cache);
  std::string load(const char* name, LoadedMethod& into, const LoadBackendOptionsMap& options);
  std::string run(LoadedMethod& m, const int64_t* ids, int64_t count, int64_t pos, const float* ple);
};

std::string edge_kv_engine::open(const std::string& path, const std::string& packed_cache) {
  forget_reason();
  // Never mlock: as root that would pin every lookup table in memory.
  auto file = MmapDataLoader::from(path.c_str(), MmapDataLoader::MlockConfig::NoMlock);
  if (!file.ok()) return said("the file cannot be mapped", file.error());
  loader.emplace(std::move(file.get()));
  auto parsed = Program::load(&*loader, Program::Verification::InternalConsistency);
  if (!parsed.ok()) return said("it is not a .pte of this ExecuTorch", parsed.error());
  program.emplace(std::move(parsed.get()));

  for (const char* name : {"prefill", "decode"}) {
    auto meta = program->method_meta(name);
    if (!meta.ok()) return std::string("it has no method ") + name;
    for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
      const size_t bytes = size_t(meta->memory_planned_buffer_size(i).get());
      if (i == arenas.size()) arenas.push_back(std::make_unique<Arena>(bytes));
      else if (arenas[i]->size() < bytes) arenas[i] = std::make_unique<Arena>(bytes);
    }
  }
  for (const auto& arena : arenas)
    if (!arena->ok()) return "out of memory for its planned buffers";

  BackendOptions<4> xnnpack;
  LoadBackendOptionsMap options;
  // Both methods use the same weights: pack them once.
  if (xnnpack.set_option("weight_cache_enabled", true) != Error::Ok ||
      (!packed_cache.empty() &&
       xnnpack.set_option("packed_cache_path", packed_cache.c_str()) != Error::Ok) ||
      options.set_options("XnnpackBackend", xnnpack.view()) != Error::Ok)
    return "XNNPACK refused its options; the cache path is too long";
  std::string fault = load("prefill", prefill, options);
  if (fault.empty()) fault = load("decode", decode, options);
  if (fault.empty()) advise_random(path);
  return fault;
}

std::string edge_kv_engine::load(const char* name, LoadedMethod& into,
                                 const LoadBackendOptionsMap& options) {
  auto meta = program->method_meta(name);
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i)
    into.spans.push_back({arenas[i]->data(), size_t(meta->memory_planned_buffer_size(i).get())});
  into.planned.emplace(Span<Span<uint8_t>>(into.spans.data(), into.spans.size()));
  into.memory.emplace(&method_memory, &*into.planned, &temporary_memory);
  if (meta->num_inputs() > 2) {
    auto ple = meta->input_tensor_meta(2);
    if (!ple.ok() || ple->sizes().size() != 3) return std::string(name) + " has unknown inputs";
    into.ple_layers = ple->sizes()[1];
    into.ple_dim = ple->sizes()[2];
  }
  auto loaded = program->load_method(name, &*into.memory, nullptr, nullptr, &options);
  if (!loaded.ok()) return said(std::string("method ") + name, loaded.error());
  into.method.emplace(std::move(loaded.get()));
  return "";
}

std::string edge_kv_engine::run(LoadedMethod& m, const int64_t* ids, int64_t count, int64_t pos,
                                const float* ple) {
  forget_reason();
  Input tokens(ScalarType::Long, ids, {count}), position(ScalarType::Long, &pos, {1});
  Input rows(ScalarType::Float, ple, {count, m.ple_layers, m.ple_dim});
  Error error = m.method->set_input(tokens.value(), 0);
  if (error == Error::Ok) error = m.method->set_input(position.value(), 1);
  if (error == Error::Ok && m.ple_dim) {
    if (!ple) return "the per-layer rows are missing";
    error = m.method->set_input(rows.value(), 2);
  }
  if (error != Error::Ok) return said("an input was refused", error);
  error = m.method->execute();
  return error == Error::Ok ? "" : said("execution failed", error);
}

extern "C" {

edge_kv_engine* edge_kv_open(const char* program, const char* packed_cache, int threads,
                             char* error, int error_bytes) {
  static const bool ready = [] {
    runtime_init();
    return register_pal(PalImpl::create(keep_reason, __FILE__));
  }();
  if (!ready) {
    fail(error, error_bytes, "ExecuTorch's log cannot be taken over");
    return nullptr;
  }
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (threads > 0 && pool && pool->get_thread_count() != size_t(threads))
    pool->_unsafe_reset_threadpool(uint32_t(threads));
  auto engine = std::make_unique<edge_kv_engine>();
  const std::string fault = engine->open(program, packed_cache);
  if (fault.empty()) return engine.release();
  fail(error, error_bytes, fault);
  return nullptr;
}

void edge_kv_close(edge_kv_engine* engine) { delete engine; }

void* edge_kv_state(edge_kv_engine* engine, int64_t* bytes) {
  if (engine->arenas.size() <= kStateArena) {
    *bytes = 0;
    return nullptr;
  }
  *bytes = int64_t(engine->arenas[kStateArena]->size());
  return engine->arenas[kStateArena]->data();
}

int64_t edge_kv_fact(edge_kv_engine* engine, const char* name, int64_t otherwise) {
  LoadedMethod constant;
  if (!engine->program->method_meta(name).ok()) return otherwise;
  if (!engine->load(name, constant, LoadBackendOptionsMap()).empty()) return otherwise;
  if (constant.method->execute() != Error::Ok) return otherwise;
  const EValue& value = constant.method->get_output(0);
  return value.isInt() ? value.toInt() : otherwise;
}

int edge_kv_prefill(edge_kv_engine* engine, const int64_t* ids, int64_t count, int64_t pos,
                    const float* ple, char* error, int error_bytes) {
  const std::string fault = engine->run(engine->prefill, ids, count, pos, ple);
  return fault.empty() ? 0 : fail(error, error_bytes, fault);
}

int edge_kv_decode(edge_kv_engine* engine, int64_t id, int64_t pos, const float* ple, float* logits,
                   int64_t vocab, char* error, int error_bytes) {
  const std::string fault = engine->run(engine->decode, &id, 1, pos, ple);
  if (!fault.empty()) return fail(error, error_bytes, fault);
  const Tensor out = engine->decode.method->get_output(0).toTensor();
  if (out.numel() != vocab) return fail(error, error_bytes, "it has another vocabulary");
  memcpy(logits, out.const_data_ptr<float>(), size_t(vocab) * sizeof(float));
  return 0;
}

const char* edge_kv_isa(void) { return edge_kv::best_kernels().name; }

}  // extern "C"
