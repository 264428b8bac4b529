#include "running.h"

namespace edge_kv {
namespace {

constexpr Running kNobody{nullptr, 1, false};
thread_local const Running* current = &kNobody;

}  // namespace

const Running& running() { return *current; }

Pool running_pool() {
  return {current->threads, [](int64_t count, void (*task)(void*, int64_t), void* context) {
            current->workers->run(current->threads, count, task, context);
          }};
}

Turn::Turn(const Running& engine) : before_(current) { current = &engine; }
Turn::~Turn() { current = before_; }

}  // namespace edge_kv
