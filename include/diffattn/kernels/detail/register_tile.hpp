#pragma once

// The register tile: kRows x kCols sums that live in vector registers while `depth` products are added to each. Every
// product of the library (Q Kᵀ, A V, a linear layer) is made of these.
//
// Per step of depth it loads two packets of b, broadcasts kRows scalars of a, and does 2·kRows fused multiply-adds:
// with 16 registers 12 FMAs for 8 loads, which keeps both FMA pipes of a core with two load ports busy.

#include <type_traits>

#include "diffattn/core/simd.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar>
struct Tile {
  static constexpr Index kLanes = simd::kLanes<Scalar>;
  static constexpr Index kPackets = 2;
  static constexpr Index kCols = kPackets * kLanes;
  /// Two packets of b and one broadcast stay free beside the sums.
  static constexpr Index kRows = simd::kRegisters >= 32 ? 12 : 6;
};

constexpr Index round_up(Index n, Index multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr Index divide_up(Index n, Index divisor) { return (n + divisor - 1) / divisor; }

/// The sums of one tile of kHeight <= kRows rows and kPackets packets of columns: row r, columns p·kLanes ….
template <typename Scalar, Index kHeight = Tile<Scalar>::kRows, Index kPackets = Tile<Scalar>::kPackets>
struct TileSums {
  simd::Packet<Scalar> sums[kHeight][kPackets];

  EIGEN_ALWAYS_INLINE void set_zero() {
#pragma GCC unroll 16
    for (Index r = 0; r < kHeight; ++r) {
#pragma GCC unroll 2
      for (Index p = 0; p < kPackets; ++p) sums[r][p] = simd::broadcast(Scalar(0));
    }
  }

  /// from, to: rows `stride` apart, aligned to a packet.
  EIGEN_ALWAYS_INLINE void load(const Scalar* from, Index stride) {
#pragma GCC unroll 16
    for (Index r = 0; r < kHeight; ++r) {
#pragma GCC unroll 2
      for (Index p = 0; p < kPackets; ++p) {
        sums[r][p] = simd::load(from + r * stride + p * Tile<Scalar>::kLanes);
      }
    }
  }
  EIGEN_ALWAYS_INLINE void store(Scalar* to, Index stride) const {
#pragma GCC unroll 16
    for (Index r = 0; r < kHeight; ++r) {
#pragma GCC unroll 2
      for (Index p = 0; p < kPackets; ++p) {
        simd::store(to + r * stride + p * Tile<Scalar>::kLanes, sums[r][p]);
      }
    }
  }

  /// sums(r, c) += Σ_k a[r·kRowStep + k·kDepthStep] · b[k·kCols + c], k in [0, depth).
  template <Index kRowStep, Index kDepthStep>
  EIGEN_ALWAYS_INLINE void add_product(const Scalar* a, const Scalar* b, Index depth) {
    for (Index k = 0; k < depth; ++k) {
      simd::Packet<Scalar> right[kPackets];
#pragma GCC unroll 2
      for (Index p = 0; p < kPackets; ++p) right[p] = simd::load(b + p * Tile<Scalar>::kLanes);
#pragma GCC unroll 16
      for (Index r = 0; r < kHeight; ++r) {
        const simd::Packet<Scalar> left = simd::broadcast(a[r * kRowStep]);
#pragma GCC unroll 2
        for (Index p = 0; p < kPackets; ++p) sums[r][p] = simd::fma(left, right[p], sums[r][p]);
      }
      a += kDepthStep;
      b += Tile<Scalar>::kCols;
    }
  }
};

/// Calls f(height, packets) with the size of the smallest tile that holds rows x cols, as constants: the ends of a
/// matrix need not pay for a whole tile. rows <= kRows; more columns than a tile has are as many as it has.
template <typename Scalar, typename F>
EIGEN_ALWAYS_INLINE void with_tile(Index rows, Index cols, F&& f) {
  constexpr Index kThird = Tile<Scalar>::kRows / 3;
  using std::integral_constant;
  const auto with_height = [&](auto packets) {
    if (rows > 2 * kThird) return f(integral_constant<Index, Tile<Scalar>::kRows>{}, packets);
    if (rows > kThird) return f(integral_constant<Index, 2 * kThird>{}, packets);
    return f(integral_constant<Index, kThird>{}, packets);
  };
  if (cols > Tile<Scalar>::kLanes) return with_height(integral_constant<Index, Tile<Scalar>::kPackets>{});
  return with_height(integral_constant<Index, 1>{});
}

}  // namespace diffattn::inline v0_1::detail
