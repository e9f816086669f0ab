#pragma once

// 2^(s·x) for s·x that are negative or small, the only exponential a softmax needs: e^x is 2^(log2(e)·x).
//
// s·x = n + f with n the nearest integer and |f| <= 1/2; 2^(s·x) = 2^n · p(f). Adding a large constant leaves n in the
// low bits of a float's significand, and shifting them into the exponent gives 2^n: no conversion, no table. Both uses
// of s·x are fused multiply-adds, so that the product costs no instruction and, where they are fused, no rounding.
// Below the smallest normal number 2^n is 0 exactly, so -inf gives 0 and a masked key has no weight at all. NaN stays
// NaN. p is the minimax polynomial for the relative error, with p(0) = 1 so that 2^0 is exact.

#include <array>

#include "diffattn/core/simd.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Scalar>
struct Exp2Constants;

template <>
struct Exp2Constants<float> {
  static constexpr int kSignificandBits = 23;
  static constexpr float kShifter = 12582912.0f + 127.0f;  // 1.5 · 2^23 + exponent bias
  static constexpr float kLowest = -127.0f;
  static constexpr std::array<float, 6> kPolynomial = {0x1.471382p-13f, 0x1.5f58d8p-10f, 0x1.3b254cp-7f,
                                                       0x1.c6ae66p-5f,  0x1.ebfbeap-3f,  0x1.62e432p-1f};  // f^6 … f^1
};

template <>
struct Exp2Constants<double> {
  static constexpr int kSignificandBits = 52;
  static constexpr double kShifter = 6755399441055744.0 + 1023.0;  // 1.5 · 2^52 + exponent bias
  static constexpr double kLowest = -1023.0;
  static constexpr std::array<double, 11> kPolynomial = {
      4.4352807904564280237e-10, 7.0741056308633289716e-9, 1.0178198034320938919e-7, 1.3215433089567187614e-6,
      1.5252733489958517546e-5,  1.5403530462514668492e-4, 1.3333558146789952573e-3, 9.6181291075883350392e-3,
      5.5504108664819921475e-2,  2.4022650695910156205e-1, 6.9314718055994533046e-1};  // f^11 … f^1
};

/// x ↦ 2^(scale · x) in every lane, scale · x < 127 or NaN. 12 instructions for float with fused multiply-add.
template <typename Scalar>
class ScaledExp2 {
  using C = Exp2Constants<Scalar>;
  using Packet = simd::Packet<Scalar>;

 public:
  /// A positive scale, not so small that kLowest / scale is infinite.
  EIGEN_ALWAYS_INLINE explicit ScaledExp2(Scalar scale)
      : scale_(simd::broadcast(scale)), lowest_(simd::broadcast(C::kLowest / scale)) {}

  EIGEN_ALWAYS_INLINE Packet operator()(const Packet& x) const {
    const auto shifter = simd::broadcast(C::kShifter);
    const auto clamped = simd::max(x, lowest_);
    const auto shifted = simd::barrier(simd::fma(clamped, scale_, shifter));
    const auto minus_n = simd::barrier(simd::sub(shifter, shifted));
    const auto f = simd::fma(clamped, scale_, minus_n);
    auto p = simd::broadcast(C::kPolynomial[0]);
#pragma GCC unroll 16
    for (std::size_t i = 1; i < C::kPolynomial.size(); ++i) p = simd::fma(p, f, simd::broadcast(C::kPolynomial[i]));
    p = simd::fma(p, f, simd::broadcast(Scalar(1)));
    return simd::mul(p, simd::shift_bits_left<C::kSignificandBits, Scalar>(shifted));
  }

 private:
  Packet scale_;
  Packet lowest_;  // exp2 of it is 0
};

}  // namespace diffattn::inline v0_1::detail
