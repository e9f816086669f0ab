#pragma once

// Where the threads that are ranks meet. Each says what it is about to do; once all have come, each takes what is meant
// for it from the memory of the others, and all leave together, so that the memory is there as long as it is read.

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/distributed/communicator.hpp"
#include "diffattn/distributed/detail/error_text.hpp"

namespace diffattn::inline v0_1::detail {

/// What a rank is about to do. Sizes are in bytes.
struct RankCall {
  const char* name = "";
  const std::byte* send = nullptr;
  std::span<const Index> send_sizes = {};
  std::span<const Index> receive_sizes = {};
  Index size = 0;
  Index root = 0;
};

class ThreadRanks {
 public:
  explicit ThreadRanks(Index size) : calls_(static_cast<std::size_t>(size)), errors_(static_cast<std::size_t>(size)) {}

  Index size() const { return static_cast<Index>(calls_.size()); }

  /// Waits for all ranks, calls take(calls of all ranks), and waits until all have taken. Throws std::invalid_argument
  /// on all ranks if their calls do not fit each other, RankError if one does not come.
  template <typename Take>
  void meet(Index rank, const RankCall& call, Take&& take) {
    calls_[static_cast<std::size_t>(rank)] = call;
    wait_for_all(call.name);
    const std::string misfit = what_does_not_fit();
    if (misfit.empty()) take(calls_);
    wait_for_all(call.name);
    if (!misfit.empty()) throw_invalid({misfit.c_str()});
  }

  /// Rank `rank` has returned: whoever waits for it waits in vain.
  void leave(Index rank) { end(rank, nullptr, "has returned"); }

  /// The same of a rank that has thrown.
  void fail(Index rank, const std::exception_ptr& error) { end(rank, error, "has failed: " + text_of(error)); }

  /// Throws what the lowest rank has thrown that failed by itself, if any has.
  void rethrow() const {
    std::exception_ptr first = nullptr;
    for (const std::exception_ptr& error : errors_) {
      if (error == nullptr) continue;
      if (first == nullptr) first = error;
      try {
        std::rethrow_exception(error);
      } catch (const RankError&) {  // which follows from the failure of another
      } catch (...) {
        throw;
      }
    }
    if (first != nullptr) std::rethrow_exception(first);
  }

 private:
  void end(Index rank, const std::exception_ptr& error, const std::string& how) {
    const std::lock_guard<std::mutex> lock(mutex_);
    errors_[static_cast<std::size_t>(rank)] = error;
    if (ended_.empty()) ended_ = "rank " + std::to_string(rank) + " " + how;
    all_came_.notify_all();
  }

  void wait_for_all(const char* name) {
    std::unique_lock<std::mutex> lock(mutex_);
    const std::uint64_t round = round_;
    if (++waiting_ == size()) {
      waiting_ = 0;
      ++round_;
      all_came_.notify_all();
      return;
    }
    all_came_.wait(lock, [&] { return round_ != round || !ended_.empty(); });
    if (round_ == round) {
      --waiting_;
      throw RankError(std::string(name) + ": " + ended_ + ", and this rank waits for it");
    }
  }

  // Empty if all calls fit each other. The same answer on every rank.
  std::string what_does_not_fit() const {
    const RankCall& first = calls_.front();
    for (std::size_t r = 1; r < calls_.size(); ++r) {
      const std::string how = differs(calls_[r], first);
      if (!how.empty()) return join({"rank 0 calls ", first.name, ", rank ", static_cast<Index>(r), " ", how.c_str()});
    }
    for (std::size_t from = 0; from < calls_.size(); ++from) {
      for (std::size_t to = 0; to < calls_.size() && !first.send_sizes.empty(); ++to) {
        const Index sent = calls_[from].send_sizes[to], expected = calls_[to].receive_sizes[from];
        if (sent == expected) continue;
        return join({first.name, ": rank ", static_cast<Index>(from), " sends ", sent, " bytes to rank ",
                     static_cast<Index>(to), ", which expects ", expected});
      }
    }
    return {};
  }

  static std::string differs(const RankCall& call, const RankCall& first) {
    if (std::string_view(call.name) != first.name) return std::string("calls ") + call.name;
    if (call.root != first.root) return "with another root";
    const bool gathers = call.send_sizes.empty();
    const bool same_sizes = std::equal(call.receive_sizes.begin(), call.receive_sizes.end(),
                                       first.receive_sizes.begin(), first.receive_sizes.end());
    if (call.size != first.size || (gathers && !same_sizes)) return "with other sizes";
    return {};
  }

  std::vector<RankCall> calls_;
  std::vector<std::exception_ptr> errors_;
  std::mutex mutex_;
  std::condition_variable all_came_;
  Index waiting_ = 0;
  std::uint64_t round_ = 0;
  std::string ended_;  // of the first rank that returned or threw
};

}  // namespace diffattn::inline v0_1::detail
