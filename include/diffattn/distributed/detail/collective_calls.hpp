#pragma once

// The calls of a communicator, written once for those of this library: sizes are checked, bytes are counted, and what
// is left to a communicator are three functions on bytes.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/distributed/reduction.hpp"

namespace diffattn::inline v0_1::detail {

/// Copies `size` bytes, which may already be where they belong.
inline void copy_bytes(std::byte* to, const std::byte* from, Index size) {
  if (to != from && size > 0) std::memcpy(to, from, static_cast<std::size_t>(size));
}

/// The sum of counts, none of which may be negative.
inline Index sum_of_counts(const char* where, std::span<const Index> counts) {
  Index sum = 0;
  for (std::size_t r = 0; r < counts.size(); ++r) {
    if (counts[r] < 0) throw_invalid({where, ": the count of rank ", static_cast<Index>(r), " is ", counts[r]});
    sum += counts[r];
  }
  return sum;
}

/// reserve(bytes) of a communicator that has it.
template <typename C>
void reserve_in(C& communicator, [[maybe_unused]] Index bytes) {
  if constexpr (requires { communicator.reserve(bytes); }) communicator.reserve(bytes);
}

/// Derived has rank(), size() and, on bytes, gather_bytes(mine, all, sizes), exchange_bytes(send, send_sizes, receive,
/// receive_sizes) and broadcast_bytes(values, size, root). `mine` may already lie in its place in `all`.
template <typename Derived>
class CollectiveCalls {
 public:
  /// Values up to so many bytes are reduced by gathering all of them: one step instead of two.
  static constexpr Index kGatheredBytes = 512;

  /// Finds what all_reduce of up to `bytes` bytes needs, and any other call: none of them touches the heap then.
  void reserve(Index bytes) {
    scratch<std::byte>(ranks() * kGatheredBytes + bytes + ranks() * kLargestType);
    for (auto* counts : {&send_sizes_, &receive_sizes_, &counts_, &piece_counts_}) {
      counts->reserve(static_cast<std::size_t>(ranks()));
    }
  }

  /// Replaces `values`, of the same size on every rank, by their sum over the ranks in the order of ranks, or by the
  /// largest of them.
  template <typename T>
  void all_reduce(std::span<T> values, Reduction how = Reduction::sum) {
    if (ranks() == 1 || values.empty()) return;
    if (static_cast<Index>(values.size_bytes()) <= kGatheredBytes) {
      reduce_gathered(values, how);
    } else {
      reduce_pieces(values, how);
    }
  }

  /// all = what the ranks have as `mine`, one after another: counts[r] values of rank r, told to every rank. `mine` may
  /// lie in its place in `all`, but nowhere else in it.
  template <typename T>
  void all_gather(std::span<const std::type_identity_t<T>> mine, std::span<T> all, std::span<const Index> counts) {
    check_counts("all_gather", "all", counts, all.size());
    const Index expected = counts[static_cast<std::size_t>(self().rank())];
    check_size("all_gather", "mine", mine.size(), expected);
    bytes_sent_ += static_cast<std::uint64_t>(mine.size_bytes()) * others();
    self().gather_bytes(as_bytes_of(mine), as_bytes_of(all), sizes_of<T>(counts, receive_sizes_));
  }

  /// The same for parts of equal size: all.size() = size() · mine.size().
  template <typename T>
  void all_gather(std::span<const std::type_identity_t<T>> mine, std::span<T> all) {
    counts_.assign(static_cast<std::size_t>(ranks()), static_cast<Index>(mine.size()));
    all_gather(mine, all, counts_);
  }

  /// Sends send_counts[r] values to rank r and receives receive_counts[r] from it. `send` and `receive` hold them one
  /// after another in the order of ranks, and must not overlap.
  template <typename T>
  void all_to_all(std::span<const std::type_identity_t<T>> send, std::span<const Index> send_counts,
                  std::span<T> receive, std::span<const Index> receive_counts) {
    check_counts("all_to_all", "send", send_counts, send.size());
    check_counts("all_to_all", "receive", receive_counts, receive.size());
    const auto rank = static_cast<std::size_t>(self().rank());
    check_size("all_to_all", "what a rank receives from itself", static_cast<std::size_t>(receive_counts[rank]),
               send_counts[rank]);
    bytes_sent_ += (send.size() - static_cast<std::size_t>(send_counts[rank])) * sizeof(T);
    self().exchange_bytes(as_bytes_of(send), sizes_of<T>(send_counts, send_sizes_), as_bytes_of(receive),
                          sizes_of<T>(receive_counts, receive_sizes_));
  }

  /// Replaces `values`, of the same size on every rank, by those of rank `root`.
  template <typename T>
  void broadcast(std::span<T> values, Index root) {
    if (root < 0 || root >= ranks()) {
      throw_invalid({"broadcast: root must be a rank from 0 to ", ranks() - 1, ", got ", root});
    }
    if (self().rank() == root) bytes_sent_ += static_cast<std::uint64_t>(values.size_bytes()) * others();
    self().broadcast_bytes(as_bytes_of(values), static_cast<Index>(values.size_bytes()), root);
  }

  /// What this rank has sent so far, as communicator.hpp counts it.
  std::uint64_t bytes_sent() const { return bytes_sent_; }

 private:
  friend Derived;
  CollectiveCalls() = default;

  Derived& self() { return static_cast<Derived&>(*this); }
  Index ranks() { return self().size(); }
  std::uint64_t others() { return static_cast<std::uint64_t>(ranks() - 1); }

  template <typename T>
  static auto as_bytes_of(std::span<T> values) {
    static_assert(std::is_trivially_copyable_v<T>, "diffattn: ranks exchange values that can be copied byte by byte");
    using Byte = std::conditional_t<std::is_const_v<T>, const std::byte, std::byte>;
    return reinterpret_cast<Byte*>(values.data());
  }

  template <typename T>
  std::span<const Index> sizes_of(std::span<const Index> counts, std::vector<Index>& sizes) {
    sizes.resize(counts.size());
    for (std::size_t r = 0; r < counts.size(); ++r) sizes[r] = counts[r] * static_cast<Index>(sizeof(T));
    return sizes;
  }

  void check_counts(const char* where, const char* what, std::span<const Index> counts, std::size_t size) {
    if (static_cast<Index>(counts.size()) != ranks()) {
      throw_invalid({where, ": expected a count for each of ", ranks(), " ranks, got ",
                     static_cast<Index>(counts.size()), " counts"});
    }
    check_size(where, what, size, sum_of_counts(where, counts));
  }

  static void check_size(const char* where, const char* what, std::size_t size, Index expected) {
    if (static_cast<Index>(size) == expected) return;
    throw_invalid(
        {where, ": ", what, " must hold ", expected, " values, as its counts say, got ", static_cast<Index>(size)});
  }

  template <typename T>
  std::span<T> scratch(Index count) {
    const auto bytes = static_cast<std::size_t>(count) * sizeof(T);
    if (scratch_.size() < bytes) scratch_.resize(bytes);
    return {reinterpret_cast<T*>(scratch_.data()), static_cast<std::size_t>(count)};
  }

  // `parts` holds the values of all ranks, one after another.
  template <typename T>
  static void reduce(std::span<const T> parts, std::span<T> values, Reduction how) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      T result = parts[i];
      for (std::size_t at = i + values.size(); at < parts.size(); at += values.size()) {
        if (how == Reduction::sum) {
          result = static_cast<T>(result + parts[at]);
        } else if (result < parts[at]) {
          result = parts[at];
        }
      }
      values[i] = result;
    }
  }

  template <typename T>
  void reduce_gathered(std::span<T> values, Reduction how) {
    const std::span<T> all = scratch<T>(ranks() * static_cast<Index>(values.size()));
    all_gather(values, all);
    reduce<T>(all, values, how);
  }

  // Rank r reduces piece r, which every rank sends it, and sends the result to every rank.
  template <typename T>
  void reduce_pieces(std::span<T> values, Reduction how) {
    const auto count = static_cast<Index>(values.size()), size = ranks(), rank = Index{self().rank()};
    const auto begin = [&](Index r) { return count / size * r + std::min(count % size, r); };
    piece_counts_.resize(static_cast<std::size_t>(size));
    for (Index r = 0; r < size; ++r) piece_counts_[static_cast<std::size_t>(r)] = begin(r + 1) - begin(r);
    const Index mine = piece_counts_[static_cast<std::size_t>(rank)];
    counts_.assign(static_cast<std::size_t>(size), mine);
    const std::span<T> parts = scratch<T>(size * mine);
    all_to_all(values, piece_counts_, parts, counts_);
    const std::span<T> piece = values.subspan(static_cast<std::size_t>(begin(rank)), static_cast<std::size_t>(mine));
    reduce<T>(parts, piece, how);
    all_gather(piece, values, piece_counts_);
  }

  static constexpr Index kLargestType = 64;  // of a value, in bytes: pieces are rounded up to whole ones

  std::uint64_t bytes_sent_ = 0;
  std::vector<Index> send_sizes_, receive_sizes_, counts_, piece_counts_;
  std::vector<std::byte> scratch_;
};

}  // namespace diffattn::inline v0_1::detail
