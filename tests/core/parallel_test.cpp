// Executors: each index once, workers in range, no two tasks on one worker at a time.

#include "diffattn/core/parallel.hpp"

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "diffattn/core/parallel_threads.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#ifdef _OPENMP
#include "diffattn/core/parallel_openmp.hpp"
#endif

using diffattn::Index;
using diffattn::Serial;
using diffattn::ThreadPool;

static_assert(diffattn::Executor<Serial>);
static_assert(diffattn::Executor<ThreadPool>);
static_assert(diffattn::Executor<support::AnyExecutor>);
static_assert(diffattn::Executor<support::Backwards>);
static_assert(!diffattn::Executor<int>);

namespace {

template <typename E>
void check_executor(E&& executor) {
  const Index workers = executor.concurrency();
  REQUIRE(workers >= 1);
  for (const Index count : {Index{0}, Index{1}, Index{2}, workers, workers + 1, Index{1000}}) {
    const auto slots = static_cast<std::size_t>(count);
    std::vector<std::atomic<int>> calls(slots), busy(static_cast<std::size_t>(workers));
    std::atomic<bool> right = true;
    executor.run(count, [&](Index index, Index worker) {
      if (index < 0 || index >= count || worker < 0 || worker >= workers) {
        right = false;
        return;
      }
      if (busy[static_cast<std::size_t>(worker)]++ != 0) right = false;
      ++calls[static_cast<std::size_t>(index)];
      --busy[static_cast<std::size_t>(worker)];
    });
    CHECK(right);
    for (const std::atomic<int>& call : calls) CHECK(call == 1);
  }
}

}  // namespace

TEST_CASE("Serial runs in order on the calling thread") {
  check_executor(Serial{});
  std::vector<Index> order;
  const std::thread::id caller = std::this_thread::get_id();
  bool same_thread = true;
  Serial::run(5, [&](Index index, Index) {
    order.push_back(index);
    same_thread = same_thread && std::this_thread::get_id() == caller;
  });
  CHECK(order == std::vector<Index>{0, 1, 2, 3, 4});
  CHECK(same_thread);
}

TEST_CASE("ThreadPool keeps the promise of an executor") {
  for (const Index threads : {1, 2, 3, 4, 9}) {
    ThreadPool pool(threads);
    CHECK(pool.concurrency() == threads);
    for (int i = 0; i < 20; ++i) check_executor(pool);
  }
  check_executor(ThreadPool());
  CHECK(ThreadPool(0).concurrency() == 1);
}

TEST_CASE("ThreadPool hands results over: what tasks wrote is there when run returns") {
  ThreadPool pool(3);
  std::vector<Index> values(64);
  for (Index round = 0; round < 2000; ++round) {
    pool.run(64, [&](Index index, Index) { values[static_cast<std::size_t>(index)] = round + index; });
    Index wrong = 0;
    for (Index index = 0; index < 64; ++index) wrong += values[static_cast<std::size_t>(index)] != round + index;
    REQUIRE(wrong == 0);
  }
}

TEST_CASE("ThreadPool uses its threads") {
  ThreadPool pool(2);
  std::atomic<int> waiting = 0;
  // Each of two tasks waits for the other: one thread alone would never finish.
  pool.run(2, [&](Index, Index) {
    ++waiting;
    while (waiting < 2) std::this_thread::yield();
  });
  CHECK(waiting == 2);
}

TEST_CASE("Threads that share a pool take turns") {
  ThreadPool pool(2);
  std::atomic<Index> sum = 0;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int i = 0; i < 100; ++i) pool.run(10, [&](Index index, Index) { sum += index; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(sum == 4 * 100 * 45);
}

TEST_CASE("Pools start and stop") {
  for (int i = 0; i < 50; ++i) {
    ThreadPool idle(3);
    ThreadPool busy(2);
    std::atomic<int> calls = 0;
    busy.run(3, [&](Index, Index) { ++calls; });
    CHECK(calls == 3);
  }
}

#ifdef _OPENMP
TEST_CASE("OpenMP keeps the promise of an executor") {
  check_executor(diffattn::OpenMP{});
  for (const int threads : {0, 1, 2, 3}) check_executor(diffattn::OpenMP{threads});
  std::atomic<bool> one = true;
#pragma omp parallel num_threads(2)
  if (diffattn::OpenMP{4}.concurrency() != 1) one = false;
  CHECK(one);
}
#endif

TEST_CASE("The tests' own executors keep the promise too") {
  ThreadPool pool(3);
  check_executor(support::AnyExecutor(pool));
  check_executor(support::Backwards{});
}
