#pragma once

// Several sequences stacked in the rows of one matrix.

#include <algorithm>
#include <limits>
#include <span>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1::detail {

/// Throws std::invalid_argument unless the lengths are 0 or more and add up to `rows`.
inline void check_lengths(const char* where, std::span<const Index> lengths, Index rows) {
  Index sum = 0;
  for (const Index length : lengths) {
    if (length < 0) throw_invalid({where, ": a sequence cannot have ", length, " tokens"});
    sum += std::min(length, std::numeric_limits<Index>::max() - sum);
  }
  if (sum != rows) {
    throw_shape({where, ": the lengths of the sequences must add up to the ", rows, " rows of x, got ", sum});
  }
}

}  // namespace diffattn::inline v0_1::detail
