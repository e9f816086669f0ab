#pragma once

// Communicators: how the ranks of a program, which each hold a part of the data, exchange numbers. Every function that
// works on several ranks takes one.
//
//   communicator.rank() · size()                      which rank this is, in [0, size)
//   communicator.all_reduce(values, how)              values: on every rank the sum (or maximum) over all ranks
//   communicator.all_gather(mine, all, counts)        all: the ranks' parts one after another, counts[r] from rank r
//   communicator.all_to_all(send, send_counts, receive, receive_counts)      part r of `send` goes to rank r
//   communicator.broadcast(values, root)              values: on every rank those of rank `root`
//   communicator.bytes_sent()                         by this rank so far
//
// All ranks make the same calls in the same order, with sizes that fit: each call returns on a rank once its result is
// there. SelfCommunicator is a single rank, ThreadCommunicator (thread_communicator.hpp) makes ranks of threads,
// MpiCommunicator (mpi.hpp) is MPI's. A type of your own with these members is a communicator too.
//
// Order    sums run over the ranks in their order, each value by itself: the same ranks give the same bits every time.
// Types    what can be copied byte by byte; all_reduce asks for + and <, too. Arguments are spans.
// Bytes    bytes_sent() counts values that this rank has for others, once for each rank that gets them: all_gather
//          sends (size − 1) · mine, all_reduce of n values about 2 · n · (size − 1) / size (short ones, up to
//          kGatheredBytes, n · (size − 1), in one step instead of two), and a rank sends itself nothing.
// Errors   std::invalid_argument, before anything is sent, for spans and counts that do not fit each other on this
//          rank: then the other ranks wait, with MPI for ever. check_on_all (collective_check.hpp) makes an error of one
//          rank an error on all.
// Memory   all_reduce keeps scratch of about the size of its values, which reserve(bytes) finds before: a rank that
//          lacks it in the middle of a call leaves the others waiting. A repeated call does not touch the heap, nor does
//          one of up to kGatheredBytes.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>

#include "diffattn/core/matrix.hpp"
#include "diffattn/distributed/detail/collective_calls.hpp"
#include "diffattn/distributed/reduction.hpp"

namespace diffattn::inline v0_1 {

/// Another rank has failed, or has left while this one waits for it. what() names the rank and says why.
class RankError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// What a function of this library takes as its communicator: a type with the members above.
template <typename C>
concept Communicator = requires(C& communicator, const C& constant, std::span<const float> in, std::span<float> out,
                                std::span<Index> words, std::span<const Index> counts, Index root) {
  { constant.rank() } -> std::convertible_to<Index>;
  { constant.size() } -> std::convertible_to<Index>;
  { constant.bytes_sent() } -> std::convertible_to<std::uint64_t>;
  communicator.all_reduce(out);
  communicator.all_reduce(words, Reduction::max);
  communicator.all_gather(in, out, counts);
  communicator.all_to_all(in, counts, out, counts);
  communicator.broadcast(out, root);
};

/// The communicator of a program that is alone: one rank, which sends nothing.
class SelfCommunicator : public detail::CollectiveCalls<SelfCommunicator> {
 public:
  /// 0, the only rank.
  static Index rank() { return 0; }
  /// 1.
  static Index size() { return 1; }

 private:
  friend detail::CollectiveCalls<SelfCommunicator>;

  static void gather_bytes(const std::byte* mine, std::byte* all, std::span<const Index> sizes) {
    detail::copy_bytes(all, mine, sizes[0]);
  }
  static void exchange_bytes(const std::byte* send, std::span<const Index> send_sizes, std::byte* receive,
                             std::span<const Index> /*receive_sizes*/) {
    detail::copy_bytes(receive, send, send_sizes[0]);
  }
  static void broadcast_bytes(std::byte* /*values*/, Index /*size*/, Index /*root*/) {}
};

}  // namespace diffattn::inline v0_1
