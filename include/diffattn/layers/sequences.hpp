#pragma once

// Several sequences stacked in the rows of one matrix.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <type_traits>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

/// How many rows each of several stacked sequences has: {12, 1, 17}, or any contiguous range of integers (a
/// std::vector<int>, an array, a std::span<const Index>). An argument: it reads the range in place and does not outlive
/// the call.
class SequenceLengths {
 public:
  SequenceLengths(std::initializer_list<Index> lengths) {  // NOLINT(google-explicit-constructor)
    read_from(std::data(lengths), std::size(lengths));
  }

  template <typename Range>
  requires requires(const Range& range) {
    requires std::integral<std::remove_cvref_t<decltype(*std::data(range))>>;
    std::size(range);
  }
  SequenceLengths(const Range& lengths) {  // NOLINT(google-explicit-constructor)
    read_from(std::data(lengths), std::size(lengths));
  }

  /// How many sequences there are.
  Index size() const { return size_; }
  /// The rows of the one with this number.
  Index operator[](Index number) const { return read_(data_, number); }

 private:
  template <typename Integer>
  void read_from(const Integer* lengths, std::size_t count) {
    data_ = lengths;
    size_ = static_cast<Index>(count);
    read_ = [](const void* data, Index number) {
      const Integer length = static_cast<const Integer*>(data)[number];
      // No matrix has as many rows as no Index can count: they must not come out as few, or as fewer than none.
      if constexpr (std::is_unsigned_v<Integer> && sizeof(Integer) >= sizeof(Index)) {
        if (length > static_cast<Integer>(kMost)) return kMost;
      }
      return static_cast<Index>(length);
    };
  }

  static constexpr Index kMost = std::numeric_limits<Index>::max();

  const void* data_ = nullptr;
  Index size_ = 0;
  Index (*read_)(const void* data, Index number) = nullptr;
};

namespace detail {

/// Throws std::invalid_argument unless the lengths are 0 or more and add up to `rows`, those of the matrix `name`.
inline void check_lengths(const char* where, const SequenceLengths& lengths, Index rows, const char* name = "x") {
  Index sum = 0;
  for (Index s = 0; s < lengths.size(); ++s) {
    const Index length = lengths[s];
    if (length < 0) throw_invalid({where, ": a sequence cannot have ", length, " tokens"});
    sum += std::min(length, std::numeric_limits<Index>::max() - sum);
  }
  if (sum != rows) {
    throw_shape({where, ": the lengths of the sequences must add up to the ", rows, " rows of ", name, ", got ", sum});
  }
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
