#pragma once

// The std::thread executor; link with threads. See parallel.hpp for what an executor promises.

#include <atomic>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "diffattn/core/parallel.hpp"

namespace diffattn::inline v0_1 {

/// A fixed set of std::threads that sleep between calls; the caller works as worker 0. Starting a run neither allocates
/// nor copies the task. Calls from several threads take turns; a task must not call run() on its own pool.
class ThreadPool {
 public:
  explicit ThreadPool(Index num_threads = static_cast<Index>(std::thread::hardware_concurrency())) {
    for (Index worker = 1; worker < num_threads; ++worker) {
      threads_.emplace_back([this, worker] { serve(worker); });
    }
  }

  ~ThreadPool() {
    stopping_ = true;
    start_workers();
    for (std::thread& thread : threads_) thread.join();
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  Index concurrency() const { return static_cast<Index>(threads_.size()) + 1; }

  template <typename Task>
  void run(Index count, Task&& task) {
    if (count <= 1 || threads_.empty()) return Serial::run(count, task);
    const std::lock_guard<std::mutex> turn(turn_);
    call_ = [](void* erased, Index index, Index worker) {
      (*static_cast<std::remove_reference_t<Task>*>(erased))(index, worker);
    };
    task_ = const_cast<void*>(static_cast<const void*>(&task));
    count_ = count;
    next_ = 0;
    busy_ = static_cast<Index>(threads_.size());
    start_workers();
    work(0);
    for (Index left = busy_; left != 0; left = busy_) busy_.wait(left);
  }

 private:
  void start_workers() {
    ++generation_;
    generation_.notify_all();
  }

  void work(Index worker) {
    for (Index index = next_++; index < count_; index = next_++) call_(task_, index, worker);
  }

  void serve(Index worker) {
    for (unsigned seen = 0;;) {
      generation_.wait(seen);
      seen = generation_;
      if (stopping_) return;
      work(worker);
      if (--busy_ == 0) busy_.notify_all();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex turn_;
  void (*call_)(void*, Index, Index) = nullptr;
  void* task_ = nullptr;
  Index count_ = 0;
  std::atomic<Index> next_{0};
  std::atomic<Index> busy_{0};
  std::atomic<unsigned> generation_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace diffattn::inline v0_1
