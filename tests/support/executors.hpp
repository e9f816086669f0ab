#pragma once

// Executors for tests.

#include <functional>
#include <utility>

#include "diffattn/core/parallel.hpp"

namespace support {

/// Any executor behind one type: what is called with it is compiled once.
class AnyExecutor {
 public:
  template <diffattn::Executor E>
  explicit AnyExecutor(E& executor)
      : concurrency_([&executor] { return static_cast<diffattn::Index>(executor.concurrency()); }),
        run_([&executor](diffattn::Index count, const Task& task) { executor.run(count, task); }) {}

  diffattn::Index concurrency() const { return concurrency_(); }
  template <typename F>
  void run(diffattn::Index count, F&& task) {
    run_(count, [&task](diffattn::Index index, diffattn::Index worker) { task(index, worker); });
  }

 private:
  using Task = std::function<void(diffattn::Index, diffattn::Index)>;
  std::function<diffattn::Index()> concurrency_;
  std::function<void(diffattn::Index, const Task&)> run_;
};

/// A user's own: one thread that plays several workers, and takes the tasks from the last to the first.
struct Backwards {
  diffattn::Index workers = 3;

  diffattn::Index concurrency() const { return workers; }
  template <typename Task>
  void run(diffattn::Index count, Task&& task) const {
    for (diffattn::Index index = count - 1; index >= 0; --index) task(index, index * 7 % workers);
  }
};

}  // namespace support
