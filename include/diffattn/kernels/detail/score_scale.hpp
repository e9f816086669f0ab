#pragma once

// Where the scale s of the scores goes: softmax weights are 2^(log2(e)·(s·q·k + bias − maximum)). Multiplying q by
// s·log2(e) ahead of the products would round every query; here only what a plain evaluation rounds is rounded.
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
#include "diffattn/kernels/mask.hpp"

namespace diffattn::inline v0_1::detail {

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
  if (bias == -std::numeric_limits<Scalar>::infinity()) return bias;
  return std::max(product * scale.of_products + bias, std::numeric_limits<Scalar>::lowest());
}

}  // namespace diffattn::inline v0_1::detail
