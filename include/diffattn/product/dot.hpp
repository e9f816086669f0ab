#pragma once

// The product of a query and a key where both lie: for so few rows that packing would cost more than it saves.
//
//   dot<Scalar>(a, b, depth)   a · b, both contiguous, any alignment, of Scalar or of a narrower type; 2·depth FLOP

#include "diffattn/core/simd.hpp"

namespace diffattn::inline v0_1::detail {

/// a · b. The sum across lanes of one product runs beside the multiplications of the next ones: making them for a
/// packet of products at once, by a transposition, was slower.
template <typename Scalar, typename A, typename B>
EIGEN_ALWAYS_INLINE Scalar dot(const A* a, const B* b, Index depth) {
  constexpr Index kLanes = simd::kLanes<Scalar>;
  simd::Packet<Scalar> sums[2] = {simd::broadcast(Scalar(0)), simd::broadcast(Scalar(0))};
  Index c = 0;
  for (; c + 2 * kLanes <= depth; c += 2 * kLanes) {
    sums[0] = simd::fma(simd::load_as<Scalar>(b + c), simd::load_as<Scalar>(a + c), sums[0]);
    sums[1] = simd::fma(simd::load_as<Scalar>(b + c + kLanes), simd::load_as<Scalar>(a + c + kLanes), sums[1]);
  }
  if (c + kLanes <= depth) {
    sums[0] = simd::fma(simd::load_as<Scalar>(b + c), simd::load_as<Scalar>(a + c), sums[0]);
    c += kLanes;
  }
  Scalar sum = c == 0 ? Scalar(0) : simd::reduce_add(simd::add(sums[0], sums[1]));
  for (; c < depth; ++c) sum += static_cast<Scalar>(a[c]) * static_cast<Scalar>(b[c]);
  return sum;
}

}  // namespace diffattn::inline v0_1::detail
