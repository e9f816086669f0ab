#pragma once

// The std::thread executor; link with threads. See parallel.hpp for what an executor promises.
//
//   ThreadPool pool(4);   layer.forward_into(y, x, mask, workspace, pool);
//
// Waiting    a thread that has nothing to do keeps looking for work, or for the end of the run, for 100 microseconds
//            before it sleeps; in a pool of more threads than the machine has processors it sleeps at once. A run is
//            over when its tasks are done. It does not wait for threads that have not woken up by then, so that on a
//            busy machine a pool takes little longer than one thread.
// Nesting    a task may call run() on its own pool: that run happens on the thread that called. Calls from several
//            threads take turns. A task of one pool that calls run() on another pool, and finds it busy, does the work
//            itself and does not wait.
// fork()     the child process has none of the threads: there run() throws std::runtime_error. Make a new pool in the
//            child. Destroying the old one there is safe.

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/parallel.hpp"

namespace diffattn::inline v0_1 {

namespace detail {

/// How many forks lie between this process and the one that the program began as, counted from the first call of now().
class ForkCount {
 public:
  /// The count of this process.
  static unsigned now() {
    // Not getpid(): a system call takes up to a microsecond, as long as a small run.
    static const bool registered = watch();
    return registered ? count_.load(std::memory_order_relaxed) : 0;
  }

 private:
  static bool watch() {
    const int error = pthread_atfork(nullptr, nullptr, [] { count_.fetch_add(1, std::memory_order_relaxed); });
    if (error != 0) throw std::system_error(error, std::generic_category(), "ThreadPool: pthread_atfork");
    return true;
  }

  inline static std::atomic<unsigned> count_{0};
};

/// Calls done() again and again without giving up the processor, for at most `patience`; returns whether it became
/// true. It does not yield(): on a busy machine that costs a whole slice of time, where a thread that sleeps is woken
/// first.
template <typename Done>
bool wait_awake(std::chrono::microseconds patience, const Done& done) {
  const auto until = std::chrono::steady_clock::now() + patience;
  do {
    for (int look = 0; look < 64; ++look) {
      if (done()) return true;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

}  // namespace detail

/// A fixed set of std::threads; the caller works as worker 0. Starting a run neither allocates nor copies the task.
class ThreadPool {
 public:
  /// A pool of `num_threads` workers, the caller's thread included: 0 and 1 start no thread. Throws
  /// std::invalid_argument for a number below 0 or above what any system has, std::system_error if the system has no
  /// thread left, and std::bad_alloc; threads already started are ended first.
  explicit ThreadPool(Index num_threads = static_cast<Index>(std::thread::hardware_concurrency()))
      : forks_(detail::ForkCount::now()),
        patience_(num_threads <= static_cast<Index>(std::thread::hardware_concurrency()) ? 100 : 0) {
    if (num_threads < 0) detail::throw_invalid({"ThreadPool: num_threads must be 0 or more, got ", num_threads});
    if (num_threads > kMostThreads) {
      detail::throw_invalid({"ThreadPool: num_threads must be at most ", kMostThreads, ", got ", num_threads});
    }
    try {
      threads_.reserve(static_cast<std::size_t>(std::max<Index>(num_threads, 1) - 1));
      for (Index worker = 1; worker < num_threads; ++worker) {
        threads_.emplace_back([this, worker] { serve(worker); });
      }
    } catch (...) {
      stop();
      throw;
    }
  }

  ~ThreadPool() {
    if (forks_ == detail::ForkCount::now()) {
      stop();
    } else {
      // The threads do not exist in this process, so they cannot be joined; destroying a handle that was not joined
      // would end the program. The handles are overwritten instead.
      for (std::thread& thread : threads_) std::construct_at(&thread);
    }
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// How many tasks run at once, the caller's included.
  Index concurrency() const { return static_cast<Index>(threads_.size()) + 1; }

  /// Calls task(index, worker) once for every index in [0, count). Throws what the task of the lowest index has thrown,
  /// and std::runtime_error in a forked process.
  template <typename Task>
  void run(Index count, Task&& task) {
    if (count <= 1 || threads_.empty()) return Serial::run(count, task);
    if (forks_ != detail::ForkCount::now()) throw_forked();
    std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
    if (inside_ == nullptr) {
      turn.lock();
    } else if (is_inside() || !turn.try_lock()) {
      // The pool may be busy with the very task that calls: to wait could mean to wait for ourselves.
      return Serial::run(count, task);
    }
    call_ = [](void* erased, Index index, Index worker) {
      (*static_cast<std::remove_reference_t<Task>*>(erased))(index, worker);
    };
    task_ = const_cast<void*>(static_cast<const void*>(&task));
    count_ = count;
    const Inside inside{this, inside_};
    run_all(inside);
  }

 private:
  /// The pools whose tasks a thread is in, from the innermost to the outermost.
  struct Inside {
    const ThreadPool* pool;
    const Inside* outer;
  };

  // gate_: how many threads work on the present run, and whether others may still join them.
  static constexpr std::uint32_t kClosed = 1u << 31;
  static constexpr Index kMostThreads = Index{1} << 20;
  static constexpr Index kNoError = std::numeric_limits<Index>::max();

  [[noreturn, gnu::cold, gnu::noinline]] static void throw_forked() {
    throw std::runtime_error(
        "ThreadPool: this process was forked from the one that made the pool, which has no threads here; make a new "
        "pool after fork()");
  }

  bool is_inside() const {
    for (const Inside* at = inside_; at != nullptr; at = at->outer) {
      if (at->pool == this) return true;
    }
    return false;
  }

  void run_all(const Inside& inside) {
    inside_of_tasks_ = &inside;
    next_.store(0, std::memory_order_relaxed);
    gate_.store(0, std::memory_order_release);
    wake(count_ - 1);
    work(0);
    std::uint32_t gate = gate_.fetch_or(kClosed, std::memory_order_acq_rel) | kClosed;
    while (gate != kClosed) {
      const auto over = [&] { return gate_.load(std::memory_order_acquire) == kClosed; };
      if (!detail::wait_awake(patience_, over)) gate_.wait(gate);
      gate = gate_.load(std::memory_order_acquire);
    }
    if (error_index_ == kNoError) return;
    error_index_ = kNoError;
    std::rethrow_exception(std::exchange(error_, nullptr));
  }

  /// Starts a new generation and wakes up to `most` sleeping threads for it.
  void wake(Index most) {
    generation_.fetch_add(1);
    const Index asleep = asleep_.load();  // a thread that goes to sleep after this sees the new generation first
    if (asleep <= most) {
      if (asleep > 0) generation_.notify_all();
    } else {
      for (Index i = 0; i < most; ++i) generation_.notify_one();
    }
  }

  /// Runs tasks until none is left. Indices are given out in order, so the lowest one whose task throws is always run.
  void work(Index worker) {
    const Inside* const before = std::exchange(inside_, inside_of_tasks_);
    for (Index index = next_++; index < count_; index = next_++) {
      try {
        call_(task_, index, worker);
      } catch (...) {
        next_ = count_;
        const std::lock_guard<std::mutex> lock(error_mutex_);
        if (index < error_index_) {
          error_index_ = index;
          error_ = std::current_exception();
        }
      }
    }
    inside_ = before;
  }

  bool join_run() {
    std::uint32_t gate = gate_.load(std::memory_order_relaxed);
    while ((gate & kClosed) == 0) {
      if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire, std::memory_order_relaxed))
        return true;
    }
    return false;
  }

  void serve(Index worker) {
    for (std::uint32_t seen = 0;;) {
      const auto started = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      if (!detail::wait_awake(patience_, started)) {
        ++asleep_;
        if (generation_.load() == seen) generation_.wait(seen);
        --asleep_;
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stopping_) return;
      if (!join_run()) continue;
      work(worker);
      if (gate_.fetch_sub(1, std::memory_order_acq_rel) == (kClosed | 1)) gate_.notify_one();
    }
  }

  void stop() {
    stopping_ = true;
    ++generation_;
    generation_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  inline static constinit thread_local const Inside* inside_ = nullptr;

  std::vector<std::thread> threads_;
  unsigned forks_;  // of this process when the pool was made
  std::chrono::microseconds patience_;
  std::mutex turn_;
  std::mutex error_mutex_;
  std::exception_ptr error_;
  Index error_index_ = kNoError;
  void (*call_)(void*, Index, Index) = nullptr;
  void* task_ = nullptr;
  Index count_ = 0;
  const Inside* inside_of_tasks_ = nullptr;
  std::atomic<Index> next_{0};
  std::atomic<std::uint32_t> gate_{kClosed};
  std::atomic<std::uint32_t> generation_{0};
  std::atomic<Index> asleep_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace diffattn::inline v0_1
