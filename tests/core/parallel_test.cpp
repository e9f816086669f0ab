// Executors: each index once, workers in range, no two tasks on one worker at a time; what tasks throw, what nests,
// what forks.

#include "diffattn/core/parallel.hpp"

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "diffattn/core/parallel_threads.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/throws.hpp"
#ifdef _OPENMP
#include "diffattn/core/parallel_openmp.hpp"
#endif
#if __has_include(<sys/wait.h>)
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
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

/// Tasks throw from index 50 on, the first of them last: its exception is the one that arrives, when all tasks have
/// ended, and the executor goes on.
template <typename E>
void check_exceptions(E&& executor) {
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> running = 0, started = 0;
    const auto run = [&] {
      executor.run(1000, [&](Index index, Index) {
        ++running;
        ++started;
        if (index == 50) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        --running;
        if (index >= 50) throw std::runtime_error("task " + std::to_string(index));
      });
    };
    CHECK(support::thrown_by<std::runtime_error>(run) == "task 50");
    CHECK(running == 0);
    CHECK(started >= 51);
    CHECK(started < 1000);
    std::atomic<Index> sum = 0;
    executor.run(100, [&](Index index, Index) { sum += index; });
    CHECK(sum == 4950);
  }
  CHECK_THROWS_AS(executor.run(1, [](Index, Index) { throw 7; }), int);
  CHECK_THROWS_AS(executor.run(9, [](Index, Index) { throw 7; }), int);
}

#if __has_include(<sys/wait.h>)
/// What the child process returns that f runs in; -1 if it crashes, or takes longer than 20 seconds.
int exit_code_of_child(const std::function<int()>& f) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(f());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}
#endif

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

TEST_CASE("What a task throws reaches the caller, whoever runs it") {
  for (const Index threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    check_exceptions(pool);
  }
#ifdef _OPENMP
  for (const int threads : {1, 3}) check_exceptions(diffattn::OpenMP{threads});
#endif
  check_exceptions(Serial{});
}

TEST_CASE("A worker's exception leaves nothing of the run behind on any thread") {
  ThreadPool pool(4);
  for (int round = 0; round < 200; ++round) {
    std::vector<int> local(64);  // gone when the caller unwinds
    std::atomic<int> running = 0;
    const auto run = [&] {
      pool.run(64, [&](Index index, Index worker) {
        if (worker == 0) throw std::runtime_error("caller");
        ++running;
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        ++local[static_cast<std::size_t>(index)];
        --running;
      });
    };
    CHECK_THROWS_AS(run(), std::runtime_error);
    CHECK(running == 0);
  }
}

TEST_CASE("A pool takes fewer than no threads for a mistake, and says when the system has none left") {
  CHECK(support::thrown_by<std::invalid_argument>([] { ThreadPool pool(-2); }) ==
        "ThreadPool: num_threads must be 0 or more, got -2");
  CHECK(support::thrown_by<std::invalid_argument>([] { ThreadPool pool(Index{1} << 60); }) ==
        "ThreadPool: num_threads must be at most 1048576, got 1152921504606846976");
#if __has_include(<sys/wait.h>)
  if (!support::counts_allocations()) return;  // sanitizers need more room than any limit leaves
  CHECK(exit_code_of_child([] {
          const rlimit limit{rlim_t{1} << 30, rlim_t{1} << 30};
          setrlimit(RLIMIT_AS, &limit);  // stacks of 8 MB for some hundred threads
          try {
            ThreadPool pool(1000);
          } catch (const std::system_error&) {
            ThreadPool small(2);
            std::atomic<int> calls = 0;
            small.run(10, [&](Index, Index) { ++calls; });
            return calls == 10 ? 3 : 2;
          }
          return 1;
        }) == 3);
#endif
}

TEST_CASE("A task may run tasks on its own pool, and on another's") {
  ThreadPool first(3), second(2);
  std::atomic<int> calls = 0;
  const auto count = [&](Index, Index) { ++calls; };
  first.run(4, [&](Index, Index) {
    first.run(5, [&](Index index, Index worker) {
      if (worker != 0) calls = -1000;
      second.run(3, [&](Index, Index) { first.run(2, count); });
      count(index, worker);
    });
  });
  CHECK(calls == 4 * (5 * (3 * 2 + 1)));
}

TEST_CASE("Pools that call each other do not wait for each other for ever") {
  ThreadPool first(2), second(2);
  std::atomic<int> calls = 0;
  const auto call = [&](ThreadPool& outer, ThreadPool& inner) {
    for (int i = 0; i < 200; ++i) {
      outer.run(2, [&](Index, Index) { inner.run(3, [&](Index, Index) { ++calls; }); });
    }
  };
  std::thread other([&] { call(second, first); });
  call(first, second);
  other.join();
  CHECK(calls == 2 * 200 * 2 * 3);
}

#if __has_include(<sys/wait.h>)
TEST_CASE("A forked process is told that its pool has no threads, and may make another") {
  auto pool = std::make_unique<ThreadPool>(3);
  std::atomic<int> calls = 0;
  const auto count = [&](Index, Index) { ++calls; };
  pool->run(5, count);
  const auto use_in_child = [&] {
    const std::string message = support::thrown_by<std::runtime_error>([&] { pool->run(5, count); });
    if (message.find("ThreadPool: this process was forked from the one that made the pool") != 0) return 1;
    pool.reset();
    ThreadPool own(2);
    calls = 0;
    own.run(7, count);
    return calls == 7 ? 0 : 2;
  };
  if (support::counts_allocations()) CHECK(exit_code_of_child(use_in_child) == 0);

  // While another thread has a run going on, which takes the pool's lock along.
  std::atomic<bool> stop = false;
  std::thread other([&] {
    while (!stop) pool->run(9, [](Index, Index) { std::this_thread::sleep_for(std::chrono::microseconds(50)); });
  });
  if (support::counts_allocations()) {
    for (int i = 0; i < 5; ++i) CHECK(exit_code_of_child(use_in_child) == 0);
  }
  stop = true;
  other.join();
  calls = 0;
  pool->run(5, count);
  CHECK(calls == 5);
}
#endif

TEST_CASE("A pool in a thread_local or static object ends with it") {
  std::atomic<int> calls = 0;
  const auto count = [&](Index, Index) { ++calls; };
#ifndef __MINGW32__  // which frees the memory of a thread's variables before it destroys them
  std::thread([&] {
    thread_local ThreadPool local(3);
    local.run(6, count);
  }).join();
  CHECK(calls == 6);
  calls = 0;
#endif
  static ThreadPool until_exit(2);
  until_exit.run(4, count);
  CHECK(calls == 4);
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
