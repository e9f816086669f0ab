#pragma once

// Executors: how a call spreads its work over threads. Threads are the caller's business, so every function that can
// use them takes an executor, and the default is Serial.
//
//   executor.concurrency()        how many workers run at once, at least 1
//   executor.run(count, task)     calls task(index, worker) once for every index in [0, count), returns when all are
//                                 done; 0 <= worker < concurrency(), and no two tasks run on one worker at a time
//
// A type of your own with these two members is an executor too. Tasks of this library never wait for each other, and
// each output value is computed by exactly one of them in a fixed order: results are bitwise the same for any executor
// and any number of threads. OpenMP's executor is in parallel_openmp.hpp, for programs compiled with OpenMP.
//
// Exceptions  a task throws what your mask or bias throws in it. run() then starts no further tasks, waits for those
//             that are running and throws: with the executors of this library what the task of the lowest index threw,
//             which is what Serial meets first. An executor of yours may throw, too, once no task of it is running.
//             Whatever comes out of run() reaches the caller of the library: what it was to compute is then not
//             specified, but layers, models, workspaces and executors can be used again, and caches are as they were.

#include <concepts>
#include <type_traits>

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

namespace detail {
/// Stands for any task in the concept below.
struct AnyTask {
  void operator()(Index /*index*/, Index /*worker*/) const {}
};
}  // namespace detail

/// What a function of this library takes as its executor: a type with the two members above.
template <typename E>
concept Executor = requires(E& executor, Index count, detail::AnyTask task) {
  { executor.concurrency() } -> std::convertible_to<Index>;
  executor.run(count, task);
};

/// Whether a call with this executor holds but some rows of a sequence, of which others have the rest
/// (distributed/sequence_parallel.hpp): then E::SpreadsSequences is a type.
template <typename E>
inline constexpr bool spreads_sequences = requires {
  typename std::remove_cvref_t<E>::SpreadsSequences;
};

/// Whether it is the cache behind a call that is spread over ranks (distributed/cache_parallel.hpp): then
/// E::SpreadsCaches is a type, too.
template <typename E>
inline constexpr bool spreads_caches = requires {
  typename std::remove_cvref_t<E>::SpreadsCaches;
};

namespace detail {

/// check(); where ranks share a sequence, on all of them together: what is wrong on one is then an error on all.
template <typename E, typename Check>
void check_before(E& executor, [[maybe_unused]] const char* where, const Check& check) {
  if constexpr (spreads_sequences<E>) {
    executor.check(where, check);
  } else {
    check();
  }
}

/// f(), in which attention meets other ranks `exchanges` times, if ranks share a sequence or a cache: what one of them
/// throws in it, for want of memory, say, is then an error on all.
template <typename E, typename F>
void with_others(E& executor, [[maybe_unused]] const char* where, [[maybe_unused]] Index exchanges, const F& f) {
  if constexpr (spreads_sequences<E>) {
    executor.with_others(where, exchanges, f);
  } else {
    f();
  }
}

}  // namespace detail

/// The default executor: runs every task on the calling thread, in order.
struct Serial {
  /// One worker: the caller.
  static Index concurrency() { return 1; }

  /// Calls task(index, 0) for every index in [0, count). Throws what the first task that throws has thrown.
  template <typename Task>
  static void run(Index count, Task&& task) {
    for (Index index = 0; index < count; ++index) task(index, Index{0});
  }
};

}  // namespace diffattn::inline v0_1
