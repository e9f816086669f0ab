#pragma once

// The softmax: scores become weights 2^(c·(score − base)), c as split_scale has it (scores.hpp), which are
// probabilities once they are divided by their sum; and the maps of a differential head are combined.
//
//   exponentiate_row      one row at once: its base is its largest score (few rows, small problems)
//   RowSoftmax            a group of rows, one chunk of keys at a time, whose largest score is not known yet (blocks)
//   normaliser            1 / sum, or λ / sum; 0 for a row that sees no key
//   combine_maps          P1 − λ·P2, from weights and what makes probabilities of them
//   round_weights         weights in bfloat16, where the values are; combine_rounded: P1 − λ·P2 in it
//
// The base of a row in RowSoftmax is a score it has seen: the largest of its first chunk, and it moves only when a
// later score passes it by more than kHeadroom, which is rare, so that next to nothing is ever rescaled and weights
// still stay below 2^kHeadroom. A chunk keeps the base it used; whoever reads it later multiplies by 2^(c·(base − final
// base)). Sums are kept per lane and reduced across lanes once, at the end.

#include <algorithm>
#include <cmath>
#include <limits>

#include "diffattn/core/simd.hpp"
#include "diffattn/core/simd_pairs.hpp"
#include "diffattn/kernels/detail/exp2.hpp"
#include "diffattn/product/register_tile.hpp"

namespace diffattn::inline v0_1::detail {

/// The base of a row that has seen no key: finite, so that -inf less the base is -inf and a weight of 0.
template <typename Scalar>
inline constexpr Scalar kNoBase = std::numeric_limits<Scalar>::lowest();

/// to = 2^(c·(from − base)) in columns [begin, end), whole packets; both may be the same row. Returns `sums` with these
/// weights added, lane by lane.
template <typename Scalar>
EIGEN_ALWAYS_INLINE simd::Packet<Scalar> exponentiate(Scalar* to, const Scalar* from, Index begin, Index end,
                                                      Scalar base, const ScaledExp2<Scalar>& exp2,
                                                      simd::Packet<Scalar> sums) {
  const auto row_base = simd::broadcast(base);
  for (Index c = begin; c < end; c += simd::kLanes<Scalar>) {
    const auto weight = exp2(simd::sub(simd::load(from + c), row_base));
    simd::store(to + c, weight);
    sums = simd::add(sums, weight);
  }
  return sums;
}

/// What the weights of a row are relative to, and their sum.
template <typename Scalar>
struct BaseAndSum {
  Scalar base;
  Scalar sum;
};

/// The scores of a row in columns [begin, end), whole packets, become weights relative to the largest of them, in
/// place.
template <typename Scalar>
EIGEN_ALWAYS_INLINE BaseAndSum<Scalar> exponentiate_row(Scalar* scores, Index begin, Index end,
                                                        const ScaledExp2<Scalar>& exp2) {
  auto largest = simd::broadcast(kNoBase<Scalar>);
  for (Index c = begin; c < end; c += simd::kLanes<Scalar>) largest = simd::max(simd::load(scores + c), largest);
  const Scalar base = simd::reduce_max(largest);
  const auto sums = exponentiate(scores, scores, begin, end, base, exp2, simd::broadcast(Scalar(0)));
  return {base, simd::reduce_add(sums)};
}

/// What a row of weights with this sum is multiplied by: numerator / sum; 0 for a row that has seen no key.
template <typename Scalar>
Scalar normaliser(Scalar sum, Scalar numerator = 1) {
  return sum == Scalar(0) ? Scalar(0) : numerator / sum;
}

/// row = row · factor in columns [begin, end), whole packets.
template <typename Scalar>
EIGEN_ALWAYS_INLINE void scale_row(Scalar* row, Index begin, Index end, Scalar factor) {
  const auto factors = simd::broadcast(factor);
  for (Index c = begin; c < end; c += simd::kLanes<Scalar>) {
    simd::store(row + c, simd::mul(simd::load(row + c), factors));
  }
}

/// Weights of both maps become P1 − λ·P2: to = a · a_factor + b · b_factor in columns [begin, end), whole packets. `to`
/// may be a or b. The product with b is rounded before the other is added to it.
template <typename Scalar>
EIGEN_ALWAYS_INLINE void combine_maps(Scalar* to, const Scalar* a, Scalar a_factor, const Scalar* b, Scalar b_factor,
                                      Index begin, Index end) {
  const auto of_a = simd::broadcast(a_factor), of_b = simd::broadcast(b_factor);
#pragma GCC unroll 4
  for (Index c = begin; c < end; c += simd::kLanes<Scalar>) {
    simd::store(to + c, simd::fma(simd::load(a + c), of_a, simd::mul(simd::load(b + c), of_b)));
  }
}

/// Weights in columns [begin, end), whole packets, rounded to bfloat16: what meets values of bfloat16. to: pairs of
/// neighbours, of which the last may be one packet of weights and one of 0; or floats, which may be `from` itself.
EIGEN_ALWAYS_INLINE void round_weights(simd::Pair* to, const float* from, Index begin, Index end) {
  constexpr Index kLanes = simd::kLanes<float>;
  for (Index c = begin; c < end; c += 2 * kLanes) {
    const auto second = c + kLanes < end ? simd::load(from + c + kLanes) : simd::broadcast(0.0f);
    simd::store_pairs(to + c / 2, simd::pairs_of_neighbours(simd::load(from + c), second));
  }
}
EIGEN_ALWAYS_INLINE void round_weights(float* to, const float* from, Index begin, Index end) {
  for (Index c = begin; c < end; c += simd::kLanes<float>) {
    simd::store(to + c, simd::round_to_bfloat16(simd::load(from + c)));
  }
}

/// combine_maps() and then round_weights(), in one pass.
template <typename Packed>
EIGEN_ALWAYS_INLINE void combine_rounded(Packed* to, const float* a, float a_factor, const float* b, float b_factor,
                                         Index begin, Index end) {
  constexpr Index kLanes = simd::kLanes<float>;
  const auto of_a = simd::broadcast(a_factor), of_b = simd::broadcast(b_factor);
  const auto combined = [&](Index c) { return simd::fma(simd::load(a + c), of_a, simd::mul(simd::load(b + c), of_b)); };
  if constexpr (kStepDepth<Packed> == 1) {
    for (Index c = begin; c < end; c += kLanes) simd::store(to + c, simd::round_to_bfloat16(combined(c)));
  } else {
    Index c = begin;
#pragma GCC unroll 4
    for (; c + kLanes < end; c += 2 * kLanes) {
      simd::store_pairs(to + c / 2, simd::pairs_of_neighbours(combined(c), combined(c + kLanes)));
    }
    if (c < end) simd::store_pairs(to + c / 2, simd::pairs_of_neighbours(combined(c), simd::broadcast(0.0f)));
  }
}

/// Running base and sum of kRows rows.
template <typename Scalar>
struct RowSoftmax {
  static constexpr Index kRows = Tile<Scalar>::kRows;
  static constexpr Index kLanes = Tile<Scalar>::kLanes;
  /// Arrays with one value a row hold whole packets.
  static constexpr Index kPaddedRows = round_up(kRows, kLanes);
  static constexpr Scalar kHeadroom = 8;

  alignas(64) Scalar base[kPaddedRows];
  alignas(64) Scalar lane_sums[kRows][kLanes];

  void reset() {
    std::fill(base, base + kPaddedRows, kNoBase<Scalar>);
    std::fill(&lane_sums[0][0], &lane_sums[0][0] + kRows * kLanes, Scalar(0));
  }

  /// weights = exp2(c·(scores − base)) in columns [begin, end), whole packets, of `rows` rows, `stride` apart; both may
  /// be the same. Returns whether the base of a row with weights moved; then growth[r] is what earlier weights of row r
  /// are to be multiplied with.
  bool add_chunk(Scalar* weights, const Scalar* scores, Index stride, Index rows, Index begin, Index end,
                 const ScaledExp2<Scalar>& exp2, Scalar* growth) {
    alignas(64) Scalar largest[kPaddedRows];
    set_largest(largest, scores, stride, rows, begin, end);
    bool passed = false;
    for (Index r = 0; r < kRows; ++r) passed |= largest[r] > base[r] + kHeadroom;
    const bool moved = passed && move_base(largest, exp2, growth);

    for (Index r = 0; r < rows; ++r) {
      const auto sums = simd::load(lane_sums[r]);
      simd::store(lane_sums[r],
                  exponentiate(weights + r * stride, scores + r * stride, begin, end, base[r], exp2, sums));
    }
    return moved;
  }

  Scalar sum(Index r) const { return simd::reduce_add(simd::load(lane_sums[r])); }

  BaseAndSum<Scalar> base_and_sum(Index r) const { return {base[r], sum(r)}; }

 private:
  /// largest[r] = the largest score of row r. Several rows at a time, and reduced across lanes all together.
  static void set_largest(Scalar* largest, const Scalar* scores, Index stride, Index rows, Index begin, Index end) {
    constexpr Index kTogether = kRows > 6 ? 4 : 3;
    simd::Packet<Scalar> packets[kPaddedRows];
    for (auto& packet : packets) packet = simd::broadcast(kNoBase<Scalar>);
    for (Index first = 0; first < rows; first += kTogether) {
      const Scalar* row[kTogether];
      simd::Packet<Scalar> together[kTogether];
      for (Index i = 0; i < kTogether; ++i) {
        row[i] = scores + std::min(first + i, rows - 1) * stride;
        together[i] = simd::broadcast(kNoBase<Scalar>);
      }
      for (Index c = begin; c < end; c += kLanes) {
#pragma GCC unroll 4
        for (Index i = 0; i < kTogether; ++i) together[i] = simd::max(together[i], simd::load(row[i] + c));
      }
      for (Index i = 0; i < kTogether; ++i) packets[first + i] = together[i];
    }
    for (Index first = 0; first < kPaddedRows; first += kLanes) {
      simd::Packet<Scalar> block[kLanes];
      for (Index i = 0; i < kLanes; ++i) block[i] = packets[first + i];
      simd::transpose<Scalar>(block);
      for (Index half = kLanes / 2; half > 0; half /= 2) {
        for (Index i = 0; i < half; ++i) block[i] = simd::max(block[i], block[i + half]);
      }
      simd::store(largest + first, block[0]);
    }
  }

  bool move_base(const Scalar* largest, const ScaledExp2<Scalar>& exp2, Scalar* growth) {
    bool moved = false;
    for (Index r = 0; r < kRows; ++r) {
      growth[r] = 1;
      if (!(largest[r] > base[r] + kHeadroom)) continue;
      const auto factor = exp2(simd::broadcast(base[r] - largest[r]));
      // A row may have seen no other score than kNoBase, whose weight counts too.
      moved |= base[r] != kNoBase<Scalar> || sum(r) != Scalar(0);
      base[r] = largest[r];
      growth[r] = simd::first(factor);
      simd::store(lane_sums[r], simd::mul(simd::load(lane_sums[r]), factor));
    }
    return moved;
  }
};

}  // namespace diffattn::inline v0_1::detail
