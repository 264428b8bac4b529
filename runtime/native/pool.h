// Threads for the kernels, where no runtime lends its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace edge_kv {

// Threads that stay, and look out for the next job a while before they sleep. A job ends when its
// tasks are done: a thread that the system keeps waiting meanwhile takes no part in it and is not
// waited for.
class Workers {
 public:
  Workers() = default;
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;
  ~Workers() {
    ended_ = true;
    wake();
    for (std::thread& thread : threads_) thread.join();
  }

  // task(context, i) for i in [0, count), on this thread and at most `threads` - 1 others.
  void run(int threads, int64_t count, void (*task)(void*, int64_t), void* context) {
    const std::lock_guard<std::mutex> one_job(job_);
    while (int(threads_.size()) < threads - 1)
      threads_.emplace_back([this, seen = posted_.load()] { work(seen); });
    task_ = task;
    context_ = context;
    count_ = count;
    next_ = 0;
    places_ = threads - 1;
    open_ = true;
    wake();
    drain();
    open_ = false;  // whoever is inside by now has a task; whoever comes later finds it closed
    while (inside_ > 0) std::this_thread::yield();
  }

 private:
  static constexpr int kLooks = 2000;

  void wake() {
    const std::lock_guard<std::mutex> lock(sleep_);
    ++posted_;
    wake_.notify_all();
  }

  void drain() {
    for (int64_t i; (i = next_++) < count_;) task_(context_, i);
  }

  void work(int64_t seen) {
    while (true) {
      for (int look = 0; posted_ == seen && look < kLooks; ++look) std::this_thread::yield();
      if (posted_ == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, [&] { return posted_ != seen; });
      }
      seen = posted_;
      if (ended_) return;
      ++inside_;
      if (open_ && places_-- > 0) drain();
      --inside_;
    }
  }

  std::mutex job_, sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::atomic<int64_t> posted_{0}, next_{0};
  std::atomic<int> inside_{0}, places_{0};
  std::atomic<bool> open_{false}, ended_{false};
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace edge_kv
