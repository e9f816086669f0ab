#pragma once

// Ranks as threads of one process: what runs on many machines by MPI runs in one, for tests and for one big machine.
//
//   run_ranks(4, [&](ThreadCommunicator& communicator) { … });      // calls it on 4 threads, returns when all are done
//
// Errors   a rank that throws, or returns while others wait for it, does not leave them hanging: their call, and every
//          later one, throws RankError with what went wrong. run_ranks then throws what the lowest rank has thrown that
//          failed by itself. Ranks that make different calls, or calls whose sizes do not fit each other, all get
//          std::invalid_argument, which names both calls.
// Cost     values are copied once, from one rank's memory to the other's. Link with threads.

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/distributed/communicator.hpp"
#include "diffattn/distributed/detail/thread_ranks.hpp"

namespace diffattn::inline v0_1 {

/// One rank of run_ranks: used by the thread that got it, and by no other.
class ThreadCommunicator : public detail::CollectiveCalls<ThreadCommunicator> {
 public:
  ThreadCommunicator(const ThreadCommunicator&) = delete;
  ThreadCommunicator& operator=(const ThreadCommunicator&) = delete;

  /// Which rank this is, in [0, size()).
  Index rank() const { return rank_; }
  /// How many ranks there are.
  Index size() const { return ranks_.size(); }

 private:
  friend detail::CollectiveCalls<ThreadCommunicator>;
  template <typename F>
  friend void run_ranks(Index size, F&& f);

  ThreadCommunicator(detail::ThreadRanks& ranks, Index rank) : ranks_(ranks), rank_(rank) { reserve(0); }

  void gather_bytes(const std::byte* mine, std::byte* all, std::span<const Index> sizes) {
    ranks_.meet(rank_, {.name = "all_gather", .send = mine, .receive_sizes = sizes}, [&](auto& calls) {
      for (std::size_t r = 0; r < calls.size(); all += sizes[r++]) detail::copy_bytes(all, calls[r].send, sizes[r]);
    });
  }

  void exchange_bytes(const std::byte* send, std::span<const Index> send_sizes, std::byte* receive,
                      std::span<const Index> receive_sizes) {
    const detail::RankCall call{
        .name = "all_to_all", .send = send, .send_sizes = send_sizes, .receive_sizes = receive_sizes};
    ranks_.meet(rank_, call, [&](auto& calls) {
      for (std::size_t r = 0; r < calls.size(); receive += receive_sizes[r++]) {
        const std::byte* from = calls[r].send;
        for (Index before = 0; before < rank_; ++before) from += calls[r].send_sizes[static_cast<std::size_t>(before)];
        detail::copy_bytes(receive, from, receive_sizes[r]);
      }
    });
  }

  void broadcast_bytes(std::byte* values, Index size, Index root) {
    ranks_.meet(rank_, {.name = "broadcast", .send = values, .size = size, .root = root},
                [&](auto& calls) { detail::copy_bytes(values, calls[static_cast<std::size_t>(root)].send, size); });
  }

  detail::ThreadRanks& ranks_;
  Index rank_;
};

/// Calls f(communicator) on `size` threads, each with its own rank, and returns when all have returned. Throws
/// std::invalid_argument for a size below 1, and what f throws as said above.
template <typename F>
void run_ranks(Index size, F&& f) {
  if (size < 1) detail::throw_invalid({"run_ranks: expected at least one rank, got ", size});
  detail::ThreadRanks ranks(size);
  const auto run_rank = [&](Index rank) {
    try {
      ThreadCommunicator communicator(ranks, rank);
      f(communicator);
      ranks.leave(rank);
    } catch (...) {
      ranks.fail(rank, std::current_exception());
    }
  };
  std::vector<std::thread> threads;
  try {
    for (Index rank = 1; rank < size; ++rank) threads.emplace_back(run_rank, rank);
    run_rank(0);
  } catch (...) {  // a thread that could not be made
    ranks.fail(0, std::current_exception());
  }
  for (std::thread& thread : threads) thread.join();
  ranks.rethrow();
}

}  // namespace diffattn::inline v0_1
