#pragma once

// The shipped masks behind two types, so that the tests compile each kernel twice and not once for every mask. A type
// of one's own is a mask too: these are.

#include <limits>
#include <type_traits>
#include <variant>

#include "diffattn/kernels/mask.hpp"

namespace support {

using diffattn::AlibiBias;
using diffattn::CausalMask;
using diffattn::FullMask;
using diffattn::Index;
using diffattn::KeyRange;
using diffattn::MatrixBias;
using diffattn::PaddingMask;
using diffattn::PrefixMask;
using diffattn::SlidingWindowMask;
using diffattn::with_bias;

using WindowOfPadding = diffattn::BothMasks<SlidingWindowMask, PaddingMask>;
using WindowOfPrefix = diffattn::BothMasks<PrefixMask, SlidingWindowMask>;

/// Any of the shipped masks without a bias: the kernels are compiled once for them all.
struct RangeMask {
  std::variant<FullMask, CausalMask, SlidingWindowMask, PrefixMask, PaddingMask, WindowOfPadding, WindowOfPrefix> any;

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const {
    return std::visit([&](const auto& mask) { return mask.visible_keys(query, n_q, n_k); }, any);
  }
  void check(const char* where, Index num_heads, Index n_q, Index n_k) const {
    std::visit([&](const auto& mask) { diffattn::detail::check_mask(where, mask, num_heads, n_q, n_k); }, any);
  }
};

/// A bias of somebody's own, which hides all keys but the first.
struct HidingBias {
  Index shown = 0;

  double operator()(Index /*head*/, Index /*query*/, Index key, Index /*n_q*/, Index /*n_k*/) const {
    return key < shown ? 0.0 : -std::numeric_limits<double>::infinity();
  }
};

/// Any of the shipped biases, and one of one's own.
template <typename Scalar>
struct AnyBias {
  std::variant<AlibiBias, HidingBias, MatrixBias<Scalar>> any;

  double operator()(Index head, Index query, Index key, Index n_q, Index n_k) const {
    return std::visit([&](const auto& bias) { return static_cast<double>(bias(head, query, key, n_q, n_k)); }, any);
  }
  void check(const char* where, Index num_heads, Index n_q, Index n_k) const {
    std::visit([&](const auto& bias) { diffattn::detail::check_mask(where, bias, num_heads, n_q, n_k); }, any);
  }
};

/// The same mask as one of the two types.
template <typename Scalar>
RangeMask erase(const RangeMask& mask) {
  return mask;
}
template <typename Scalar, typename Mask>
requires std::is_constructible_v<decltype(RangeMask::any), Mask> RangeMask erase(const Mask& mask) { return {mask}; }
template <typename Scalar, typename Mask, typename Bias>
auto erase(const diffattn::BiasedMask<Mask, Bias>& mask) {
  if constexpr (std::is_same_v<Bias, AnyBias<Scalar>>) {
    return with_bias(erase<Scalar>(mask.mask), mask.added);
  } else {
    return with_bias(erase<Scalar>(mask.mask), AnyBias<Scalar>{mask.added});
  }
}
}  // namespace support
