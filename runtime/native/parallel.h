// How kernels are spread over threads, and the memory they work in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace edge_kv {

// Runs task(context, i) for i in [0, count), on as many threads as the caller's pool has.
struct Pool {
  int threads;
  void (*run)(int64_t count, void (*task)(void* context, int64_t i), void* context);
};

// task(i) for i in [0, count) on a pool.
template <class F>
void parallel(const Pool& pool, int64_t count, F task) {
  if (count == 1 || pool.threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  pool.run(count, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); }, &task);
}

// Memory of the calling thread at a multiple of 64 bytes, good until it asks again; kept between
// steps.
float* scratch(size_t floats);

}  // namespace edge_kv

// Give back the memory that steps on the calling thread worked in: a chunk of a prompt takes far
// more than the tokens that follow it.
extern "C" __attribute__((visibility("default"))) void edge_kv_release_scratch();
