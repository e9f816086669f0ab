#pragma once

// What the scalar of the operands is to the arithmetic: products of bfloat16 are added up in float, and so is everything
// that is made of them; float and double are added up in what they are.

#include <Eigen/Core>

#include <type_traits>

#include "diffattn/core/simd_pairs.hpp"
#include "diffattn/product/register_tile.hpp"

namespace diffattn::inline v0_1::detail {

/// Whether the arithmetic has a wider scalar than the operands.
template <typename Element>
inline constexpr bool is_narrow = std::is_same_v<Element, Eigen::bfloat16>;

/// The scalar in which scores, softmax, sums and λ are computed.
template <typename Element>
using ArithmeticOf = std::conditional_t<is_narrow<Element>, float, Element>;

/// What tiles multiply: queries, keys, values and the weights that meet them are packed as this.
template <typename Element>
using PackedOf = std::conditional_t<is_narrow<Element>, simd::PackedBfloat16, Element>;

/// Number k along depth of a packed operand whose steps of depth are `step` apart.
template <typename Packed>
SumOf<Packed> at_depth(const Packed* data, Index step, Index k) {
  if constexpr (kStepDepth<Packed> == 1) {
    return data[k * step];
  } else {
    const simd::Pair& pair = data[k / 2 * step];
    return static_cast<float>(k % 2 == 0 ? pair.first : pair.second);
  }
}

}  // namespace diffattn::inline v0_1::detail
