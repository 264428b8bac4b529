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

// Threads that stay, and look out for the next job a while before they sleep.
class Workers {
 public:
  Workers() = default;
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;
  ~Workers() {
    post(nullptr, 0);
    for (std::thread& thread : threads_) thread.join();
  }

  void run(int threads, int64_t count, void (*task)(void*, int64_t), void* context) {
    const std::lock_guard<std::mutex> one_job(job_);
    while (int(threads_.size()) < threads - 1)
      threads_.emplace_back([this, seen = posted_.load()] { work(seen); });
    const std::function<void(int64_t)> call = [=](int64_t i) { task(context, i); };
    helpers_ = threads - 1;
    busy_ = int(threads_.size());
    post(&call, count);
    drain(call);
    while (busy_ > 0) std::this_thread::yield();
  }

 private:
  static constexpr int kLooks = 2000;

  void post(const std::function<void(int64_t)>* call, int64_t count) {
    next_ = 0;
    count_ = count;
    call_ = call;
    const std::lock_guard<std::mutex> lock(sleep_);
    ++posted_;
    wake_.notify_all();
  }

  void drain(const std::function<void(int64_t)>& call) {
    for (int64_t i; (i = next_++) < count_;) call(i);
  }

  void work(int64_t seen) {
    for (;; ++seen) {
      for (int look = 0; posted_ == seen && look < kLooks; ++look) std::this_thread::yield();
      if (posted_ == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, [&] { return posted_ != seen; });
      }
      if (!call_) return;
      if (helpers_-- > 0) drain(*call_);
      --busy_;
    }
  }

  std::mutex job_, sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::atomic<int64_t> posted_{0}, next_{0};
  std::atomic<int> helpers_{0}, busy_{0};
  int64_t count_ = 0;
  const std::function<void(int64_t)>* call_ = nullptr;
};

}  // namespace edge_kv
