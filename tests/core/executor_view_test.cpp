// An executor of any type behind one: every task once, on the worker that it says, and what a task throws.

#include "diffattn/core/executor_view.hpp"

#include <stdexcept>
#include <type_traits>
#include <vector>

#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/throws.hpp"

namespace {

using diffattn::Index;
using diffattn::detail::ExecutorView;
using diffattn::detail::ViewedExecutor;

}  // namespace

TEST_CASE("A view of an executor runs its tasks as the executor does", "[core]") {
  const support::Backwards backwards{5};
  ExecutorView view(backwards);
  CHECK(view.concurrency() == 5);
  std::vector<Index> order, workers;
  const auto task = [&](Index index, Index worker) {
    order.push_back(index);
    workers.push_back(worker);
  };
  view.run(4, task);
  CHECK(order == std::vector<Index>{3, 2, 1, 0});
  CHECK(workers == std::vector<Index>{21 % 5, 14 % 5, 7 % 5, 0});
  order.clear();
  ExecutorView copy = view;
  copy.run(0, task);
  CHECK(order.empty());
  int calls = 0;
  copy.run(2, [&calls](Index /*index*/, Index /*worker*/) mutable { ++calls; });
  CHECK(calls == 2);
}

TEST_CASE("What a task throws comes out of a view of an executor", "[core]") {
  support::Backwards backwards;
  const ExecutorView view(backwards);
  CHECK(support::thrown_by<std::runtime_error>([&] {
          view.run(3, [](Index index, Index /*worker*/) {
            if (index == 1) throw std::runtime_error("task 1");
          });
        }) == "task 1");
}

TEST_CASE("Serial is viewed as itself, a view as itself, everything else by a view", "[core]") {
  CHECK(std::is_same_v<ViewedExecutor<const diffattn::Serial>, diffattn::Serial>);
  CHECK(std::is_same_v<ViewedExecutor<ExecutorView>, ExecutorView>);
  CHECK(std::is_same_v<ViewedExecutor<support::Backwards>, ExecutorView>);
}
