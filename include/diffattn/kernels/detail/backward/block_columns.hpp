#pragma once

// Which columns of a chunk of keys the backward pass looks at.

#include <algorithm>

#include "diffattn/kernels/detail/blocking.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/product/register_tile.hpp"

namespace diffattn::inline v0_1::detail {

/// The columns of a chunk that hold `keys`, those that some row of a block sees: from the start of a strip up to the
/// end of a packet and of a lowest tile.
template <typename Scalar>
KeyRange block_columns(const KeyRange& keys, Index first_key) {
  constexpr Index kCols = Tile<Scalar>::kCols, kStep = std::max(Tile<Scalar>::kLanes, Tile<Scalar>::kRows / 3);
  const Index begin = std::max<Index>(keys.begin - first_key, 0) / kCols * kCols;
  return {begin, std::min(round_up(keys.end - first_key, kStep), kChunk)};
}

/// What of a block's `columns` some row of a group sees, likewise.
template <typename Scalar>
KeyRange group_columns(const KeyRange& keys, Index first_key, const KeyRange& columns) {
  const KeyRange seen = block_columns<Scalar>(keys, first_key);
  const Index begin = std::clamp(seen.begin, columns.begin, columns.end);
  return {begin, std::clamp(seen.end, begin, columns.end)};
}

}  // namespace diffattn::inline v0_1::detail
