#pragma once

// What kernels and products see of an executor: one type for all of them, so that they are compiled once and not for
// every executor that a program uses. Serial, which most calls have, stands for itself: its tasks are inlined.
//
// Cost  two calls through a pointer for every run, and one for every task.

#include <memory>
#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"

namespace diffattn::inline v0_1::detail {

/// An executor of any type, which must outlive it.
class ExecutorView {
  /// A task of any type, for the time of a run.
  struct Task {
    void* task;
    void (*call)(void* task, Index index, Index worker);

    void operator()(Index index, Index worker) const { call(task, index, worker); }
  };

 public:
  template <typename E>
  requires(!std::is_same_v<std::remove_const_t<E>, ExecutorView>) explicit ExecutorView(E& executor)
      : executor_(erased(executor)),
        concurrency_([](void* e) { return static_cast<Index>(static_cast<E*>(e)->concurrency()); }),
        run_([](void* e, Index count, const Task& task) { static_cast<E*>(e)->run(count, task); }) {}

  Index concurrency() const { return concurrency_(executor_); }

  template <typename F>
  void run(Index count, F&& task) const {
    using Called = std::remove_reference_t<F>;
    run_(executor_, count,
         Task{erased(task), [](void* f, Index index, Index worker) { (*static_cast<Called*>(f))(index, worker); }});
  }

 private:
  template <typename T>
  static void* erased(T& object) {
    return const_cast<void*>(static_cast<const volatile void*>(std::addressof(object)));
  }

  void* executor_;
  Index (*concurrency_)(void* executor);
  void (*run_)(void* executor, Index count, const Task& task);
};

/// Whether kernels and products are compiled for executors of this very type.
template <typename E>
inline constexpr bool is_viewed = std::is_same_v<E, Serial> || std::is_same_v<E, ExecutorView>;

/// What they take for an executor of this type, made from it.
template <typename E>
using ViewedExecutor = std::conditional_t<std::is_same_v<std::remove_const_t<E>, Serial>, Serial, ExecutorView>;

}  // namespace diffattn::inline v0_1::detail
