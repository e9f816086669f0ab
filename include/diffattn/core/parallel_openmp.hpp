#pragma once

// The OpenMP executor; compile with -fopenmp. See parallel.hpp for what an executor promises.
// Called from inside a parallel region it runs on the thread that called it, rather than oversubscribe the machine.
// LLVM's runtime allocates for every call of run(); GCC's does not, nor does ThreadPool.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "diffattn/core/parallel.hpp"

namespace diffattn::inline v0_1 {

/// Runs tasks in an OpenMP parallel region.
struct OpenMP {
  int num_threads = omp_get_max_threads();  ///< less than 1 means 1

  /// num_threads, or 1 inside a parallel region.
  Index concurrency() const { return omp_in_parallel() ? 1 : std::max(1, num_threads); }

  /// Calls task(index, worker) once for every index in [0, count). Throws what the task of the lowest index has thrown.
  template <typename Task>
  void run(Index count, Task&& task) const {
    if (omp_in_parallel() || count <= 1) return Serial::run(count, task);
    // No exception may leave a parallel region. Tasks before the first that threw still run: one of them may throw too.
    std::exception_ptr error;
    std::mutex mutex;
    std::atomic<Index> end{count};
#pragma omp parallel for schedule(dynamic) num_threads(std::max(1, num_threads))
    for (Index index = 0; index < count; ++index) {
      if (index >= end.load(std::memory_order_relaxed)) continue;
      try {
        task(index, static_cast<Index>(omp_get_thread_num()));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (index < end) {
          error = std::current_exception();
          end = index;
        }
      }
    }
    if (error) std::rethrow_exception(error);
  }
};

}  // namespace diffattn::inline v0_1
