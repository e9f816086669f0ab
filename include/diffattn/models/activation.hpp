#pragma once

// What stands between the two products of a feed-forward layer.
//
//   swiglu      silu(x W_gateᵀ) ∘ x W_upᵀ, silu(a) = a / (1 + exp(−a))          Shazeer, arXiv 2002.05202
//   gelu        a·Φ(a), Φ(a) = (1 + erf(a/√2)) / 2                              Hendrycks and Gimpel, arXiv 1606.08415:
//                                                                               nn.GELU's default
//   gelu_tanh   the same with (1 + tanh(√(2/π)·(a + 0.044715·a³))) / 2          nn.GELU(approximate="tanh"), GPT-2's
//   relu        max(a, 0)
//
// Accuracy  GELU to a few units in the last place of max(|a|, 1) ∘ the type, also in its tails: float and double.
// NaN stays NaN. ±infinity gives the limit: +infinity, or 0.
// Every number sees the same instructions wherever it lies, so no value depends on its neighbours.

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

/// What a FeedForward does to its inner values.
enum class Activation { swiglu, gelu, gelu_tanh, relu };

namespace detail {

/// A few packets of values, of a fixed number so that all are computed alike.
template <typename Scalar>
using ActivationChunk = Eigen::Array<Scalar, 32, 1>;

/// GELU is max(x, 0) − t·q(t) with t = |x| and q a tail that falls from 1/2 to 0: this one at t, and −q'(t).
template <typename Scalar>
struct GeluTail {
  ActivationChunk<Scalar> q, slope;
};

/// Beyond it no tail is left, in float or double.
inline constexpr int kGeluReach = 40;

/// (t + 4)·Φ(−t)·exp(t²/2) as a polynomial in s = (t − 4)/(t + 4), highest power first: of degree 9 or 22, fitted at
/// Chebyshev's nodes for t in [0, 40]. Relative errors 2.3e-8 and 3.8e-17.
template <typename Scalar>
inline constexpr std::array<Scalar, 0> kGeluPolynomial{};
template <>
inline constexpr std::array<float, 10> kGeluPolynomial<float> = {
    -0.000160762769f, 0.000127682869f, 0.00157068289f, -0.00347330968f, -0.00751675491f,
    0.0603937952f,    -0.186525627f,   0.387137806f,   -0.607896473f,   0.755285121f};
template <>
inline constexpr std::array<double, 23> kGeluPolynomial<double> = {
    -9.990624160023276e-10,  -1.015295717649618e-11,  1.3976528155950822e-8,   1.4842390072751343e-8,
    -7.6347128434410861e-8,  -1.5461968191221919e-7,  2.6354310560684454e-7,   1.0200713392568464e-6,
    -6.2499069953697852e-7,  -5.9190131861540441e-6,  7.1493083254784009e-7,   3.5144214968257804e-5,
    -1.9078434059248705e-6,  -0.00023109482414997104, 0.00013334424978358428,  0.0016308184424805886,
    -0.0034796923618040596,  -0.0075401889656250168,  0.060396574890676654,    -0.18652185795969339,
    0.38713740074221934,     -0.60789664197189176,    0.75528513041575148};

/// Φ(−t), for t in [0, kGeluReach].
template <typename Scalar>
GeluTail<Scalar> normal_tail(const ActivationChunk<Scalar>& t) {
  using Chunk = ActivationChunk<Scalar>;
  constexpr auto density_at_0 = static_cast<Scalar>(std::numbers::inv_sqrtpi / std::numbers::sqrt2);
  const Chunk inverse = Scalar(1) / (t + Scalar(4)), s = Scalar(1) - Scalar(8) * inverse;
  const Chunk gauss = (Scalar(-0.5) * t * t).exp();
  Chunk p = Chunk::Constant(kGeluPolynomial<Scalar>[0]);
  for (std::size_t i = 1; i < kGeluPolynomial<Scalar>.size(); ++i) p = p * s + kGeluPolynomial<Scalar>[i];
  return {gauss * inverse * p, density_at_0 * gauss};
}

/// 1 / (1 + exp(v)), v = 2·√(2/π)·(t + 0.044715·t³), which is (1 − tanh(v/2)) / 2.
template <typename Scalar>
GeluTail<Scalar> tanh_tail(const ActivationChunk<Scalar>& t) {
  using Chunk = ActivationChunk<Scalar>;
  constexpr auto twice = static_cast<Scalar>(2 * std::numbers::sqrt2 * std::numbers::inv_sqrtpi);
  constexpr auto cubic = static_cast<Scalar>(0.044715);
  const Chunk gauss = (-twice * t * (Scalar(1) + cubic * t * t)).exp(), q = gauss / (Scalar(1) + gauss);
  return {q, q * (Scalar(1) - q) * twice * (Scalar(1) + Scalar(3) * cubic * t * t)};
}

// Of max and min the left operand stays where it is NaN.
template <typename Scalar>
ActivationChunk<Scalar> positive_part(const ActivationChunk<Scalar>& x) {
  return x.max(Scalar(0));
}
template <typename Scalar>
ActivationChunk<Scalar> tail_argument(const ActivationChunk<Scalar>& x) {
  return x.abs().min(static_cast<Scalar>(kGeluReach));
}

/// f(x) of a chunk; not SwiGLU, which takes two.
template <typename Scalar>
ActivationChunk<Scalar> activated(Activation activation, const ActivationChunk<Scalar>& x) {
  if (activation == Activation::relu) return positive_part<Scalar>(x);
  const ActivationChunk<Scalar> t = tail_argument<Scalar>(x);
  return positive_part<Scalar>(x) - t * (activation == Activation::gelu ? normal_tail<Scalar>(t) : tanh_tail<Scalar>(t)).q;
}

/// f'(x) of a chunk. Of ReLU at 0 it is 0, as PyTorch has it.
template <typename Scalar>
ActivationChunk<Scalar> activation_slope(Activation activation, const ActivationChunk<Scalar>& x) {
  using Chunk = ActivationChunk<Scalar>;
  if (activation == Activation::relu) return (x <= Scalar(0)).select(Chunk::Zero(), Chunk::Ones());
  const Chunk t = tail_argument<Scalar>(x);
  const GeluTail<Scalar> tail = activation == Activation::gelu ? normal_tail<Scalar>(t) : tanh_tail<Scalar>(t);
  const Chunk below = tail.q - t * tail.slope;  // at −t
  return (x > Scalar(0)).select(Scalar(1) - below, below);
}

/// Calls f(y, x), which writes a chunk y from what y and x hold, for `count` values; y may be x.
template <typename Scalar, typename F>
void for_each_activation_chunk(Scalar* y, const Scalar* x, Index count, const F& f) {
  using Chunk = ActivationChunk<Scalar>;
  constexpr Index kSize = Chunk::SizeAtCompileTime;
  for (Index i = 0; i < count; i += kSize) {
    const Index here = std::min(kSize, count - i);
    Chunk y_chunk = Chunk::Zero(), x_chunk = Chunk::Zero();
    std::copy_n(y + i, here, y_chunk.data());
    std::copy_n(x + i, here, x_chunk.data());
    f(y_chunk, x_chunk);
    std::copy_n(y_chunk.data(), here, y + i);
  }
}

/// y = f(x) for `count` values; y may be x.
template <typename Scalar>
void activate_values(Activation activation, Scalar* y, const Scalar* x, Index count) {
  for_each_activation_chunk(y, x, count, [&](ActivationChunk<Scalar>& to, const ActivationChunk<Scalar>& from) {
    to = activated<Scalar>(activation, from);
  });
}

/// d = d ∘ f'(x) for `count` values.
template <typename Scalar>
void multiply_by_slope(Activation activation, Scalar* d, const Scalar* x, Index count) {
  for_each_activation_chunk(d, x, count, [&](ActivationChunk<Scalar>& to, const ActivationChunk<Scalar>& from) {
    to *= activation_slope<Scalar>(activation, from);
  });
}

}  // namespace detail
}  // namespace diffattn::inline v0_1
