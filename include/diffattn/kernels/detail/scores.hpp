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
#include "diffattn/core/simd.hpp"
#include "diffattn/kernels/bias_row.hpp"
#include "diffattn/kernels/detail/blocking.hpp"
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

/// Whether every row sees all of `columns`, which are keys counted from first_key, and no bias is added to them.
template <typename Mask>
bool sees_all(const RowRange<Mask>& rows, Index first_key, const KeyRange& columns) {
  const KeyRange all = rows.keys_of_all();
  return !HasBias<Mask> && first_key + columns.begin >= all.begin && first_key + columns.end <= all.end;
}

/// The biases of a row's columns: -inf in those that are not in `seen`, which are what row r sees.
template <typename Scalar, typename Mask>
void fill_biases(Scalar* biases, const RowRange<Mask>& rows, Index r, Index first_key, const KeyRange& columns,
                 const KeyRange& seen) {
  fill_unseen(biases, columns, seen, kMinusInfinity<Scalar>);
  fill_biases(BiasOfMask<Mask>{rows.mask}, biases + seen.begin,
              {rows.head, rows.first + r, first_key + seen.begin, seen.end - seen.begin, rows.n_q, rows.n_k});
}

/// The same for each of `rows`, `stride` apart: for who needs them more than once.
template <typename Scalar, typename Mask>
void fill_biases(Scalar* biases, Index stride, const RowRange<Mask>& rows, Index first_key, const KeyRange& columns) {
  for_each_row(rows, first_key, columns, [&](Index r, const KeyRange& seen) {
    fill_biases(biases + r * stride, rows, r, first_key, columns, seen);
  });
}

/// Products of a query and keys become scores, whole packets. Only a bias of -inf masks, whatever the product is: what
/// would fall below all finite numbers is the lowest of them.
template <typename Scalar>
EIGEN_ALWAYS_INLINE void add_biases(Scalar* products, const Scalar* biases, const KeyRange& columns,
                                    const ScoreScale<Scalar>& scale) {
  const auto factor = simd::broadcast(scale.of_products), hidden = simd::broadcast(kMinusInfinity<Scalar>),
             lowest = simd::broadcast(std::numeric_limits<Scalar>::lowest());
  for (Index c = columns.begin; c < columns.end; c += simd::kLanes<Scalar>) {
    const auto bias = simd::load(biases + c);
    const auto score = simd::max(simd::fma(simd::load(products + c), factor, bias), lowest);
    simd::store(products + c, simd::select_equal<Scalar>(bias, hidden, hidden, score));
  }
}

/// Products of queries and keys, in place, become scores: -inf for what a row does not see, with a bias for what it
/// does. `products` has a row for each of `rows`, `stride` apart; of its columns, keys counted from first_key, those in
/// `columns` are looked at: whole packets, no more than a chunk. biases: theirs, if fill_biases() has been called.
template <typename Scalar, typename Mask>
void finish_scores(Scalar* products, Index stride, const RowRange<Mask>& rows, Index first_key, const KeyRange& columns,
                   const ScoreScale<Scalar>& scale, [[maybe_unused]] const Scalar* biases = nullptr) {
  if (sees_all(rows, first_key, columns)) return;
  for_each_row(rows, first_key, columns, [&](Index r, const KeyRange& seen) {
    Scalar* const row = products + r * stride;
    if constexpr (!HasBias<Mask>) {
      fill_unseen(row, columns, seen, kMinusInfinity<Scalar>);
    } else if (biases != nullptr) {
      add_biases(row, biases + r * stride, columns, scale);
    } else {
      alignas(simd::kMostAlignment) Scalar of_row[kChunk];
      fill_biases(of_row, rows, r, first_key, columns, seen);
      add_biases(row, of_row, columns, scale);
    }
  });
}

/// 0 in the place of what a row does not see, hidden by its range or its bias; otherwise as finish_scores, where the
/// biases have been filled in. For the gradients of weights, since 0 · (NaN − D) would not be 0.
template <typename Scalar, typename Mask>
void clear_hidden(Scalar* values, Index stride, const RowRange<Mask>& rows, Index first_key, const KeyRange& columns,
                  [[maybe_unused]] const Scalar* biases) {
  if (sees_all(rows, first_key, columns)) return;
  for_each_row(rows, first_key, columns, [&](Index r, const KeyRange& seen) {
    Scalar* const row = values + r * stride;
    if constexpr (!HasBias<Mask>) {
      fill_unseen(row, columns, seen, Scalar(0));
    } else {
      const auto hidden = simd::broadcast(kMinusInfinity<Scalar>), zero = simd::broadcast(Scalar(0));
      for (Index c = columns.begin; c < columns.end; c += simd::kLanes<Scalar>) {
        const auto bias = simd::load(biases + r * stride + c);
        simd::store(row + c, simd::select_equal<Scalar>(bias, hidden, zero, simd::load(row + c)));
      }
    }
  });
}

}  // namespace diffattn::inline v0_1::detail
