#pragma once

// The softmax of a group of rows, one chunk of keys at a time.
//
// Each chunk of scores becomes 2^(c·(score − base)), c as split_scale has it (score_scale.hpp). The base of a row is a
// score it has seen: the largest of its first chunk, and it moves only when a later score passes it by more than
// kHeadroom, which is rare, so that next to nothing is ever rescaled and weights still stay below 2^kHeadroom. A chunk
// keeps the base it used; whoever reads it later multiplies by 2^(c·(base − final base)). Sums are kept per lane and
// reduced across lanes once, at the end.

#include <algorithm>
#include <cmath>
#include <limits>

#include "diffattn/core/simd.hpp"
#include "diffattn/kernels/detail/exp2.hpp"
#include "diffattn/product/register_tile.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar>
inline constexpr Scalar kMinusInfinity = -std::numeric_limits<Scalar>::infinity();

/// A maximum to subtract: a row that has seen no key has none, and 0 serves it as well as any.
template <typename Scalar>
Scalar finite_or_zero(Scalar max) {
  return max == kMinusInfinity<Scalar> ? Scalar(0) : max;
}

/// Running base and sum of kRows rows.
template <typename Scalar>
struct RowSoftmax {
  static constexpr Index kRows = Tile<Scalar>::kRows;
  static constexpr Index kLanes = Tile<Scalar>::kLanes;
  /// Arrays with one value a row hold whole packets.
  static constexpr Index kPaddedRows = round_up(kRows, kLanes);
  static constexpr Scalar kHeadroom = 8;
  /// The base of a row that has seen no key: finite, so that -inf less the base is -inf and a weight of 0.
  static constexpr Scalar kNoBase = std::numeric_limits<Scalar>::lowest();

  alignas(64) Scalar base[kPaddedRows];
  alignas(64) Scalar lane_sums[kRows][kLanes];

  void reset() {
    std::fill(base, base + kPaddedRows, kNoBase);
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
      const Scalar* const from = scores + r * stride;
      Scalar* const to = weights + r * stride;
      const auto row_base = simd::broadcast(base[r]);
      auto sums = simd::load(lane_sums[r]);
#pragma GCC unroll 4
      for (Index c = begin; c < end; c += kLanes) {
        const auto weight = exp2(simd::sub(simd::load(from + c), row_base));
        simd::store(to + c, weight);
        sums = simd::add(sums, weight);
      }
      simd::store(lane_sums[r], sums);
    }
    return moved;
  }

  Scalar sum(Index r) const { return simd::reduce_add(simd::load(lane_sums[r])); }

  /// log2 Σ 2^(c·score) over what the row has seen; -inf for nothing.
  Scalar log_sum_exp(Index r, Scalar c) const { return c * base[r] + std::log2(sum(r)); }

 private:
  /// largest[r] = the largest score of row r. Several rows at a time, and reduced across lanes all together.
  static void set_largest(Scalar* largest, const Scalar* scores, Index stride, Index rows, Index begin, Index end) {
    constexpr Index kTogether = kRows > 6 ? 4 : 3;
    simd::Packet<Scalar> packets[kPaddedRows];
    for (auto& packet : packets) packet = simd::broadcast(kNoBase);
    for (Index first = 0; first < rows; first += kTogether) {
      const Scalar* row[kTogether];
      simd::Packet<Scalar> together[kTogether];
      for (Index i = 0; i < kTogether; ++i) {
        row[i] = scores + std::min(first + i, rows - 1) * stride;
        together[i] = simd::broadcast(kNoBase);
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
      // A score of kNoBase has a weight too.
      moved |= base[r] != kNoBase || sum(r) != Scalar(0);
      base[r] = largest[r];
      growth[r] = simd::first(factor);
      simd::store(lane_sums[r], simd::mul(simd::load(lane_sums[r]), factor));
    }
    return moved;
  }
};

}  // namespace diffattn::inline v0_1::detail
