#pragma once

// The register tile: kRows x kCols sums that live in vector registers while `depth` products are added to each. Every
// product of the library (Q Kᵀ, A V, a linear layer) is made of these.
//
//   add_product(to, stride, add, a, b, depth, rows, cols, …)   one tile:  to (rows x cols) = a (rows x depth) · b, or
//   += add_products(out, out_strip, a, b, b_strip, …)             a row of tiles: any number of columns
//
// Shapes  rows <= kRows; a anywhere, by a step from row to row and one from depth to depth; b one strip,
//         [depth][kCols] (packed.hpp). Tiles of a third and two thirds of kRows, and of half of kCols, do for what is
//         left over, so that little is computed for nobody: `to` must have room for the tile.
// Sums    chains of kChain products along depth, added up in order: the result depends on nothing but the operands.
// Types   float or double; or pairs of bfloat16 (core/simd_pairs.hpp), whose sums are floats: then a step is two
//         products, `depth`, `chain` and all steps count pairs, and an odd depth has been filled up with 0.
//
// Per step of depth it loads two packets of b, broadcasts kRows scalars of a, and does 2·kRows fused multiply-adds:
// with 16 registers 12 FMAs for 8 loads, which keeps both FMA pipes of a core with two load ports busy.

#include <algorithm>
#include <type_traits>

#include "diffattn/core/simd.hpp"
#include "diffattn/core/simd_pairs.hpp"

namespace diffattn::inline v0_1::detail {

/// What a tile's sums are, and how many products it adds to each in a step: one, or two for pairs of bfloat16.
template <typename Operand>
using SumOf = std::conditional_t<std::is_same_v<Operand, simd::Pair>, float, Operand>;
template <typename Operand>
inline constexpr Index kStepDepth = std::is_same_v<Operand, simd::Pair> ? 2 : 1;

template <typename Scalar>
struct Tile {
  static constexpr Index kLanes = simd::kLanes<Scalar>;
  static constexpr Index kPackets = 2;
  static constexpr Index kCols = kPackets * kLanes;
  /// Two packets of b and one broadcast stay free beside the sums.
  static constexpr Index kRows = simd::kRegisters >= 32 ? 12 : 6;
};

/// Products that are added up in one chain along depth; the sums of chains are then added to each other. An error grows
/// with the length of a chain: with 64, 256 keys have half the error of a single chain, for 1 to 3 % of the time; with
/// 32 no less, for another 1 %.
inline constexpr Index kChain = 64;
/// The steps of a chain.
template <typename Operand>
inline constexpr Index kChainSteps = kChain / kStepDepth<Operand>;

constexpr Index round_up(Index n, Index multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr Index divide_up(Index n, Index divisor) { return (n + divisor - 1) / divisor; }
/// The steps of a depth: pairs, where the operand is one.
template <typename Operand>
constexpr Index steps_of(Index depth) {
  return divide_up(depth, kStepDepth<Operand>);
}

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
  EIGEN_ALWAYS_INLINE void add(const Scalar* from, Index stride) {
#pragma GCC unroll 16
    for (Index r = 0; r < kHeight; ++r) {
#pragma GCC unroll 2
      for (Index p = 0; p < kPackets; ++p) {
        sums[r][p] = simd::add(sums[r][p], simd::load(from + r * stride + p * Tile<Scalar>::kLanes));
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
};

/// The left operand of a product: a(r, k) = data[r·row_step + k·depth_step]. Rows up to the height of the tile are
/// read.
template <typename Operand>
struct LeftOperand {
  const Operand* data;
  Index row_step;
  Index depth_step;
};

/// Memory that a later product will read or write. A product fetches it as it goes, evenly over its steps, so that the
/// later one does not wait and this one does not notice.
template <typename Scalar>
struct Ahead {
  const Scalar* data = nullptr;
  Index size = 0;
};

template <typename Scalar, typename Operand, Index kHeight, Index kPackets>
EIGEN_ALWAYS_INLINE void add_product_of_size(Scalar* to, Index stride, bool add, const LeftOperand<Operand>& a,
                                             const Operand* b, Index depth, Index chain, Ahead<Scalar> first,
                                             Ahead<Scalar> second) {
  TileSums<Scalar, kHeight, kPackets> tile;
  // Three pointers and one step, doubled and tripled in the address: what the general registers have room for.
  constexpr Index kThird = divide_up(kHeight, 3);
  const Index row = a.row_step;
  const Operand* rows[3] = {a.data, a.data + kThird * row, a.data + 2 * kThird * row};
  for (Index remaining = depth;; remaining -= chain) {
    tile.set_zero();
    for (Index steps = std::min(remaining, chain); steps > 0; --steps) {
      decltype(simd::load_operand(b)) right[kPackets];
#pragma GCC unroll 2
      for (Index p = 0; p < kPackets; ++p) right[p] = simd::load_operand(b + p * Tile<Scalar>::kLanes);
#pragma GCC unroll 16
      for (Index r = 0; r < kHeight; ++r) {
        const auto left = simd::broadcast_operand(rows[r / kThird] + (r % kThird) * row);
#pragma GCC unroll 2
        for (Index p = 0; p < kPackets; ++p) tile.sums[r][p] = simd::multiply_add(left, right[p], tile.sums[r][p]);
      }
#pragma GCC unroll 3
      for (const Operand*& third : rows) third += a.depth_step;
      b += Tile<Scalar>::kCols;
      simd::prefetch(first.data);
      first.data += first.size;
      simd::prefetch(second.data);
      second.data += second.size;
    }
    if (add) tile.add(to, stride);
    tile.store(to, stride);
    if (remaining <= chain) return;
    add = true;
  }
}

/// to(r, c) = Σ_k a(r, k) · b[k·kCols + c], or += with `add`, for the smallest tile that holds rows x cols: rows of
/// `to` are `stride` apart and aligned to a packet; cols may exceed kCols, of which the tile computes kCols. Fetches
/// `first` and `second` on the way. A chain (see kChain) starts at every multiple of `chain`. A call of its own,
/// compiled once for each scalar: beside the product it costs nothing, and compiling it at every use would cost
/// seconds.
template <typename Scalar, typename Operand>
EIGEN_DONT_INLINE void add_product(Scalar* to, Index stride, bool add, const LeftOperand<Operand>& a, const Operand* b,
                                   Index depth, Index rows, Index cols, const Ahead<Scalar>& first = {},
                                   const Ahead<Scalar>& second = {}, Index chain = kChainSteps<Operand>) {
  static_assert(std::is_same_v<Scalar, SumOf<Operand>>);
  constexpr Index kThird = Tile<Scalar>::kRows / 3;
  // What to fetch in a step of depth. Where there is nothing to fetch, b is asked for: it is near, and that costs less
  // than a branch.
  const auto per_step = [&](const Ahead<Scalar>& ahead) {
    return ahead.data == nullptr ? Ahead<Scalar>{reinterpret_cast<const Scalar*>(b), 0}
                                 : Ahead<Scalar>{ahead.data, divide_up(ahead.size, depth)};
  };
  const Ahead<Scalar> first_step = per_step(first), second_step = per_step(second);
  const auto of_width = [&](auto packets) {
    constexpr Index kPackets = decltype(packets)::value;
    if (rows > 2 * kThird)
      return add_product_of_size<Scalar, Operand, 3 * kThird, kPackets>(to, stride, add, a, b, depth, chain, first_step,
                                                                        second_step);
    if (rows > kThird)
      return add_product_of_size<Scalar, Operand, 2 * kThird, kPackets>(to, stride, add, a, b, depth, chain, first_step,
                                                                        second_step);
    return add_product_of_size<Scalar, Operand, kThird, kPackets>(to, stride, add, a, b, depth, chain, first_step,
                                                                  second_step);
  };
  if (cols > Tile<Scalar>::kLanes) return of_width(std::integral_constant<Index, Tile<Scalar>::kPackets>{});
  return of_width(std::integral_constant<Index, 1>{});
}

/// out += a · b for up to kRows rows and any number of columns. out: strips of kCols columns, `strip_size` apart; b:
/// strips over `depth`, b_strip apart. Fetches `first`, which is first_strip further on for every strip, and `second`,
/// of which every strip takes the next piece.
template <typename Scalar, typename Operand>
void add_products(Scalar* out, Index out_strip, const LeftOperand<Operand>& a, const Operand* b, Index b_strip,
                  Index rows, Index cols, Index depth, Ahead<Scalar> first, Index first_strip, Ahead<Scalar> second) {
  constexpr Index kCols = Tile<Scalar>::kCols;
  if (depth <= 0) return;
  for (Index col = 0; col < cols; col += kCols, out += out_strip, b += b_strip) {
    add_product(out, kCols, true, a, b, depth, rows, cols - col, first, second);
    if (first.data != nullptr) first.data += first_strip;
    if (second.data != nullptr) second.data += second.size;
  }
}

}  // namespace diffattn::inline v0_1::detail
