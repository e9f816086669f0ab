#pragma once

// Ranks as processes, on one machine or many, by MPI. The only header that includes <mpi.h>; CMake: diffattn::mpi.
//
//   MPI_Init(&argc, &argv);
//   {
//     MpiCommunicator communicator(MPI_COMM_WORLD);
//     …
//   }
//   MPI_Finalize();
//
// MPI stays the program's: nothing here calls MPI_Init or MPI_Finalize, and the communicator that is handed over stays
// the caller's, who may free it at any time once the object is made: a duplicate of it is what works, so that messages
// of the library never meet those of the program. It is freed with the object.
//
// Threads  the calls come from the thread that makes them, one at a time: MPI_Init, or MPI_THREAD_FUNNELED, will do.
// Errors   std::invalid_argument for a communicator that is MPI_COMM_NULL, as MPI_Comm_free leaves it, or that connects
//          two groups, and before MPI_Init or after MPI_Finalize. RankError for what MPI reports in a call. An exception
//          that ends one process leaves the others waiting: a program calls MPI_Abort for what it does not handle, and
//          check_on_all (collective_check.hpp) where an error is to be expected. A process that dies ends the others
//          by MPI's own means.
// Sizes    of any number of bytes, although MPI counts in int: what is longer than a message goes in pieces.

#include <mpi.h>

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/distributed/communicator.hpp"

namespace diffattn::inline v0_1 {

/// The processes of an MPI communicator.
class MpiCommunicator : public detail::CollectiveCalls<MpiCommunicator> {
 public:
  /// Over the processes of `communicator`, all of which make this call. Throws as said above. No message is longer than
  /// `longest_message` bytes.
  explicit MpiCommunicator(MPI_Comm communicator, int longest_message = 1 << 30) : longest_message_(longest_message) {
    if (longest_message < 1) {
      detail::throw_invalid({"MpiCommunicator: longest_message must be at least 1 byte, got ", longest_message});
    }
    check_usable(communicator);
    check(MPI_Comm_dup(communicator, &own_), "MPI_Comm_dup");
    check(MPI_Comm_set_errhandler(own_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    check(MPI_Comm_rank(own_, &rank_), "MPI_Comm_rank");
    check(MPI_Comm_size(own_, &size_), "MPI_Comm_size");
    reserve(0);
    const auto ranks = static_cast<std::size_t>(size_);
    for (auto* of_ranks : {&send_starts_, &receive_starts_, &send_sizes_}) of_ranks->reserve(ranks);
    for (auto* of_ranks : {&counts_, &displacements_}) of_ranks->reserve(ranks);
  }

  MpiCommunicator(const MpiCommunicator&) = delete;
  MpiCommunicator& operator=(const MpiCommunicator&) = delete;

  ~MpiCommunicator() {
    if (!finalized()) MPI_Comm_free(&own_);
  }

  /// Which rank this process is, in [0, size()).
  Index rank() const { return rank_; }
  /// How many processes there are.
  Index size() const { return size_; }

 private:
  friend detail::CollectiveCalls<MpiCommunicator>;

  static void check(int code, const char* call) {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    MPI_Error_string(code, text, &length);
    throw RankError(std::string("MpiCommunicator: ") + call + ": " + text);
  }

  static bool finalized() {
    int yes = 0;
    MPI_Finalized(&yes);
    return yes != 0;
  }

  static void check_running() {
    if (finalized()) detail::throw_invalid({"MpiCommunicator: MPI_Finalize has been called already"});
  }

  static void check_usable(MPI_Comm communicator) {
    int initialized = 0;
    MPI_Initialized(&initialized);
    if (initialized == 0) detail::throw_invalid({"MpiCommunicator: call MPI_Init before, which has not been called"});
    check_running();
    if (communicator == MPI_COMM_NULL) {
      detail::throw_invalid({"MpiCommunicator: the communicator is MPI_COMM_NULL: was it freed?"});
    }
    int between_groups = 0;
    check(MPI_Comm_test_inter(communicator, &between_groups), "MPI_Comm_test_inter");
    if (between_groups != 0) {
      detail::throw_invalid(
          {"MpiCommunicator: expected the processes of one group, got an intercommunicator: merge it"});
    }
  }

  void gather_bytes(const std::byte* mine, std::byte* all, std::span<const Index> sizes) {
    check_running();
    starts_of(sizes, receive_starts_);
    const std::size_t me = static_cast<std::size_t>(rank_), last = sizes.size() - 1;
    if (receive_starts_[last] + sizes[last] > longest_message_) {
      detail::copy_bytes(all + receive_starts_[me], mine, sizes[me]);
      send_starts_.assign(sizes.size(), 0);
      send_sizes_.assign(sizes.size(), sizes[me]);
      exchange_with_others(mine, send_sizes_, all, sizes);
      return;
    }
    const bool in_place = mine == all + receive_starts_[me];
    const void* const from = in_place ? MPI_IN_PLACE : mine;
    if (std::all_of(sizes.begin(), sizes.end(), [&](Index size) { return size == sizes[0]; })) {
      const auto size = static_cast<int>(sizes[0]);
      check(MPI_Allgather(from, size, MPI_BYTE, all, size, MPI_BYTE, own_), "MPI_Allgather");
      return;
    }
    counts_.assign(sizes.begin(), sizes.end());
    displacements_.assign(receive_starts_.begin(), receive_starts_.end());
    check(MPI_Allgatherv(from, counts_[me], MPI_BYTE, all, counts_.data(), displacements_.data(), MPI_BYTE, own_),
          "MPI_Allgatherv");
  }

  void exchange_bytes(const std::byte* send, std::span<const Index> send_sizes, std::byte* receive,
                      std::span<const Index> receive_sizes) {
    check_running();
    starts_of(send_sizes, send_starts_);
    starts_of(receive_sizes, receive_starts_);
    const auto me = static_cast<std::size_t>(rank_);
    detail::copy_bytes(receive + receive_starts_[me], send + send_starts_[me], send_sizes[me]);
    exchange_with_others(send, send_sizes, receive, receive_sizes);
  }

  // Step by step with the rank that is `step` further on and the one that is as far behind, piece by piece. The ranks'
  // numbers of pieces differ: MPI_PROC_NULL stands for those that are not there.
  void exchange_with_others(const std::byte* send, std::span<const Index> send_sizes, std::byte* receive,
                            std::span<const Index> receive_sizes) {
    for (int step = 1; step < size_; ++step) {
      const int to = (rank_ + step) % size_, from = (rank_ + size_ - step) % size_;
      const auto t = static_cast<std::size_t>(to), f = static_cast<std::size_t>(from);
      for (Index at = 0; at < std::max(send_sizes[t], receive_sizes[f]); at += longest_message_) {
        const bool sends = at < send_sizes[t], receives = at < receive_sizes[f];
        check(MPI_Sendrecv(sends ? send + send_starts_[t] + at : nullptr, piece(send_sizes[t], at), MPI_BYTE,
                           sends ? to : MPI_PROC_NULL, 0, receives ? receive + receive_starts_[f] + at : nullptr,
                           piece(receive_sizes[f], at), MPI_BYTE, receives ? from : MPI_PROC_NULL, 0, own_,
                           MPI_STATUS_IGNORE),
              "MPI_Sendrecv");
      }
    }
  }

  void broadcast_bytes(std::byte* values, Index size, Index root) {
    check_running();
    for (Index at = 0; at < size; at += longest_message_) {
      check(MPI_Bcast(values + at, piece(size, at), MPI_BYTE, static_cast<int>(root), own_), "MPI_Bcast");
    }
  }

  // Bytes of the piece that begins at `at`.
  int piece(Index size, Index at) const { return static_cast<int>(std::clamp(size - at, Index{0}, longest_message_)); }

  static void starts_of(std::span<const Index> sizes, std::vector<Index>& starts) {
    starts.assign(sizes.size(), 0);
    for (std::size_t r = 1; r < sizes.size(); ++r) starts[r] = starts[r - 1] + sizes[r - 1];
  }

  Index longest_message_;
  MPI_Comm own_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 0;
  std::vector<Index> send_starts_, receive_starts_, send_sizes_;
  std::vector<int> counts_, displacements_;
};

}  // namespace diffattn::inline v0_1
