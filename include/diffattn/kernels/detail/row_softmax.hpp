#pragma once

// The softmax of a group of rows, one chunk of keys at a time, in the log2 domain.
//
// Each chunk of scores becomes exp2(score − m) in place, with m the largest score that its row has shown so far. A
// chunk keeps the m it used; whoever reads it later multiplies by exp2(m − final m). Sums are kept per lane, so that a
// row is reduced across lanes once for its maximum in each chunk, and once for its sum at the end.

#include <algorithm>
#include <cmath>
#include <limits>

#include "diffattn/core/simd.hpp"
#include "diffattn/kernels/detail/exp2.hpp"
#include "diffattn/kernels/detail/register_tile.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar>
inline constexpr Scalar kMinusInfinity = -std::numeric_limits<Scalar>::infinity();

/// A maximum to subtract: a row that has seen no key has none, and 0 serves it as well as any.
template <typename Scalar>
Scalar finite_or_zero(Scalar max) {
  return max == kMinusInfinity<Scalar> ? Scalar(0) : max;
}

/// Running maximum and sum of kRows rows.
template <typename Scalar>
struct RowSoftmax {
  static constexpr Index kRows = Tile<Scalar>::kRows;
  static constexpr Index kLanes = Tile<Scalar>::kLanes;
  /// Arrays with one value a row hold whole packets.
  static constexpr Index kPaddedRows = round_up(kRows, kLanes);

  alignas(64) Scalar max[kPaddedRows];
  alignas(64) Scalar lane_sums[kRows][kLanes];

  void reset() {
    std::fill(max, max + kPaddedRows, kMinusInfinity<Scalar>);
    std::fill(&lane_sums[0][0], &lane_sums[0][0] + kRows * kLanes, Scalar(0));
  }

  /// scores: `rows` rows, `stride` apart; columns [begin, end), whole packets, become weights relative to max. Returns
  /// whether the maximum of any row grew.
  bool add_chunk(Scalar* scores, Index stride, Index rows, Index begin, Index end) {
    bool grew = false;
    for (Index r = 0; r < rows; ++r) {
      Scalar* const row = scores + r * stride;
      auto packet_max = simd::load(row + begin);
      for (Index c = begin + kLanes; c < end; c += kLanes) packet_max = simd::max(packet_max, simd::load(row + c));
      const Scalar chunk_max = simd::reduce_max(packet_max);

      auto sums = simd::load(lane_sums[r]);
      if (chunk_max > max[r]) {
        grew = true;
        sums = simd::mul(sums, exp2_nonpositive<Scalar>(simd::broadcast(max[r] - chunk_max)));
        max[r] = chunk_max;
      }
      const auto base = simd::broadcast(finite_or_zero(max[r]));
      for (Index c = begin; c < end; c += kLanes) {
        const auto weight = exp2_nonpositive<Scalar>(simd::sub(simd::load(row + c), base));
        simd::store(row + c, weight);
        sums = simd::add(sums, weight);
      }
      simd::store(lane_sums[r], sums);
    }
    return grew;
  }

  Scalar sum(Index r) const { return simd::reduce_add(simd::load(lane_sums[r])); }

  /// log2 Σ 2^score over what the row has seen; -inf for nothing.
  Scalar log_sum_exp(Index r) const { return max[r] + std::log2(sum(r)); }
};

}  // namespace diffattn::inline v0_1::detail
