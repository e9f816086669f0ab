#pragma once

// From products to scores: what a row sees, where the scale goes, and what a bias adds. Blocks, few rows and small
// problems multiply queries and keys each in their own way; a row of products becomes a row of scores here.
//
// Softmax weights are 2^(log2(e)·(s·q·k + bias − maximum)) for a scale s. Multiplying q by s·log2(e) ahead of the
// products would round every query; here only what a plain evaluation rounds is rounded.
//
//   without a bias   q is multiplied by a power of two with the sign of s, which is exact, and the exponential by what
//                    is left of s·log2(e), between 1 and 2, in a fused multiply-add (exp2.hpp)
//   with a bias      s·q·k + bias is one fused multiply-add; the exponential multiplies by log2(e)
//
// In both cases the maximum is taken off before anything is multiplied by log2(e): a bias or a score of any finite size
// stays finite.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/detail/visible_pairs.hpp"
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

/// The score of a key that a row does not see.
template <typename Scalar>
inline constexpr Scalar kMinusInfinity = -std::numeric_limits<Scalar>::infinity();

template <typename Scalar>
struct ScoreScale {
  Scalar of_queries;   // what q is multiplied by before it meets a key
  Scalar of_products;  // what that product is multiplied by before a bias is added
  Scalar of_exponent;  // what the difference of two scores is multiplied by for 2^x: log2(e), or a part of s·log2(e)
};

/// The scale s of the scores under a mask of this type.
template <typename Mask, typename Scalar>
ScoreScale<Scalar> split_scale(Scalar s) {
  constexpr Scalar kLog2E = std::numbers::log2e_v<Scalar>;
  if constexpr (HasBias<Mask>) return {Scalar(1), s, kLog2E};
  int exponent = 0;
  const Scalar fraction = std::frexp(std::abs(s) * kLog2E, &exponent);  // in [1/2, 1)
  // 0, or so far from 1 that a power of two of its size would not be a number.
  if (!(fraction >= Scalar(0.5)) || !std::isnormal(std::ldexp(Scalar(1), exponent - 1))) return {s, Scalar(1), kLog2E};
  return {std::copysign(std::ldexp(Scalar(1), exponent - 1), s), Scalar(1), 2 * fraction};
}

/// A product of a query and a key with the bias of the pair. Only a bias of -inf masks: what would fall below all
/// finite numbers is the lowest of them.
template <typename Scalar>
Scalar biased_score(Scalar product, const ScoreScale<Scalar>& scale, Scalar bias) {
  if (bias == kMinusInfinity<Scalar>) return bias;
  return std::max(product * scale.of_products + bias, std::numeric_limits<Scalar>::lowest());
}

/// Whether every row sees all of `columns`, which are keys counted from first_key, and no bias is added to them.
template <typename Mask>
bool sees_all(const RowRange<Mask>& rows, Index first_key, const KeyRange& columns) {
  const KeyRange all = rows.keys_of_all();
  return !HasBias<Mask> && first_key + columns.begin >= all.begin && first_key + columns.end <= all.end;
}

/// Products of queries and keys, in place, become scores: -inf for what a row does not see, with a bias for what it
/// does. `products` has a row for each of `rows`, `stride` apart; of its columns, keys counted from first_key, those in
/// `columns` are looked at.
template <typename Scalar, typename Mask>
void finish_scores(Scalar* products, Index stride, const RowRange<Mask>& rows, Index first_key, const KeyRange& columns,
                   const ScoreScale<Scalar>& scale) {
  if (sees_all(rows, first_key, columns)) return;
  for_each_row(rows, first_key, columns, [&](Index r, const KeyRange& seen) {
    Scalar* const row = products + r * stride;
    fill_unseen(row, columns, seen, kMinusInfinity<Scalar>);
    if constexpr (HasBias<Mask>) {
      for (Index c = seen.begin; c < seen.end; ++c) {
        const auto bias = bias_of<Scalar>(rows.mask, rows.head, rows.first + r, first_key + c, rows.n_q, rows.n_k);
        row[c] = biased_score(row[c], scale, bias);
      }
    }
  });
}

/// 0 in the place of what a row does not see, hidden by its range or its bias; otherwise as finish_scores. For the
/// gradients of weights, since 0 · (NaN − D) would not be 0.
template <typename Scalar, typename Mask>
void clear_hidden(Scalar* values, Index stride, const RowRange<Mask>& rows, Index first_key, const KeyRange& columns) {
  if (sees_all(rows, first_key, columns)) return;
  for_each_row(rows, first_key, columns, [&](Index r, const KeyRange& seen) {
    Scalar* const row = values + r * stride;
    fill_unseen(row, columns, seen, Scalar(0));
    for (Index c = seen.begin; HasBias<Mask> && c < seen.end; ++c) {
      if (!bias_shows(rows.mask, rows.head, rows.first + r, first_key + c, rows.n_q, rows.n_k)) row[c] = Scalar(0);
    }
  });
}

}  // namespace diffattn::inline v0_1::detail
