// A pool of threads that works off one list of tasks at a time.
//
// The caller works too and returns when every task is done, so a pool without a living worker (one
// core, or the child of a fork) is still right. Workers spin a while before they sleep: in decode
// the next list comes within a fraction of a millisecond.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace host_attention {

constexpr auto kSpin = std::chrono::microseconds(100);

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

class Pool {
 public:
  using Task = void (*)(void* state, int64_t index, int worker);

  // `threads` in all: the caller of `run` is one of them.
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Held by whoever runs a list and uses the workspace.
  std::mutex& turn() { return turn_; }

  // Runs task(state, i, worker) for i in [0, count); the caller holds `turn`.
  void run(Task task, void* state, int64_t count) {
    next_.store(0, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = task;
      state_ = state;
      count_ = count;
      open_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(task, state, count, 0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_ = false;
    }
    while (active_.load(std::memory_order_acquire) != 0) pause();
  }

  // Bytes that outlive a list; grows only. For the holder of `turn`.
  char* workspace(size_t bytes) {
    if (workspace_.size() < bytes) {
      workspace_.clear();
      workspace_.resize(bytes);
    }
    return workspace_.data();
  }

 private:
  void work(Task task, void* state, int64_t count, int worker) {
    while (true) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count) return;
      task(state, index, worker);
    }
  }

  void serve(int worker) {
    uint64_t seen = 0;
    while (true) {
      const auto until = std::chrono::steady_clock::now() + kSpin;
      while (generation_.load(std::memory_order_acquire) == seen &&
             std::chrono::steady_clock::now() < until) {
        for (int i = 0; i < 32; ++i) pause();
      }
      Task task;
      void* state;
      int64_t count;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (stop_) return;
        if (!open_) continue;
        task = task_;
        state = state_;
        count = count_;
        active_.fetch_add(1, std::memory_order_relaxed);
      }
      work(task, state, count, worker);
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> active_{0};
  bool open_ = false, stop_ = false;
  Task task_ = nullptr;
  void* state_ = nullptr;
  int64_t count_ = 0;
  std::vector<std::thread> workers_;
  std::vector<char> workspace_;
};

}  // namespace host_attention
