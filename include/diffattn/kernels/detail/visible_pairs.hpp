#pragma once

// Which pairs of query and key are visible, for a range of query rows and the columns of a chunk of keys: what a mask
// is to the kernels.

#include <algorithm>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

/// Query rows [first, first + count) out of n_q of one query head, with what they may see.
template <typename Mask>
struct RowRange {
  const Mask& mask;
  Index head;
  Index first;
  Index count;
  Index n_q;
  Index n_k;

  KeyRange keys_of(Index row) const { return mask.visible_keys(row, n_q, n_k); }
  /// Keys that some row sees; neither end of a mask's ranges decreases from row to row.
  KeyRange keys_of_any() const { return {keys_of(first).begin, keys_of(first + count - 1).end}; }
  KeyRange keys_of_all() const { return {keys_of(first + count - 1).begin, keys_of(first).end}; }

  /// The same rows of another head.
  RowRange of_head(Index other) const {
    RowRange rows = *this;
    rows.head = other;
    return rows;
  }
  RowRange rows(Index begin, Index num) const {
    return {mask, head, first + begin, std::min(num, count - begin), n_q, n_k};
  }

  /// The rows, counted from the first, that see some of `keys`.
  KeyRange rows_that_see(const KeyRange& keys) const {
    Index begin = 0, end = count;
    while (begin < end && keys_of(first + begin).end <= keys.begin) ++begin;
    while (begin < end && keys_of(first + end - 1).begin >= keys.end) --end;
    return {begin, end};
  }
};

/// Keys that some query of a call sees; the others need not be looked at.
template <typename Mask>
KeyRange keys_of_any_query(const Mask& mask, Index n_q, Index n_k) {
  const Index end = mask.visible_keys(n_q - 1, n_q, n_k).end;
  return {std::min(mask.visible_keys(0, n_q, n_k).begin, end), end};
}

/// Calls f(r, seen) for every row, counted from the first, with the columns that the mask's range lets it see. Columns
/// are keys counted from first_key.
template <typename Mask, typename F>
void for_each_row(const RowRange<Mask>& rows, Index first_key, const KeyRange& columns, F&& f) {
  for (Index r = 0; r < rows.count; ++r) {
    const KeyRange keys = rows.keys_of(rows.first + r);
    const Index begin = std::clamp(keys.begin - first_key, columns.begin, columns.end);
    f(r, KeyRange{begin, std::clamp(keys.end - first_key, begin, columns.end)});
  }
}

/// Calls f(r, c) for every visible pair: what a bias hides is not.
template <typename Mask, typename F>
void for_each_visible(const RowRange<Mask>& rows, Index first_key, const KeyRange& columns, F&& f) {
  for_each_row(rows, first_key, columns, [&](Index r, const KeyRange& seen) {
    for (Index c = seen.begin; c < seen.end; ++c) {
      if (bias_shows(rows.mask, rows.head, rows.first + r, first_key + c, rows.n_q, rows.n_k)) f(r, c);
    }
  });
}

/// `value` in the columns of one row that are not in `seen`.
template <typename Scalar>
void fill_unseen(Scalar* row, const KeyRange& columns, const KeyRange& seen, Scalar value) {
  std::fill(row + columns.begin, row + seen.begin, value);
  std::fill(row + seen.end, row + columns.end, value);
}

}  // namespace diffattn::inline v0_1::detail
