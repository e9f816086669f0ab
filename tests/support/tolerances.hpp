#pragma once

// How far a result may be from the exact one. Differential attention cancels by design, so an error relative to the
// result says nothing, and an absolute one hides bugs: errors are measured against the magnitude of what was added up,
//
//   error = |out − exact| / (u · magnitude),    magnitude = Σ P1|V| + |λ| Σ P2|V|,    u the unit roundoff,
//
// with both exact and magnitude evaluated in long double by the oracle, never by the code under test.

#include <algorithm>
#include <cmath>
#include <limits>

#include "diffattn/core/matrix.hpp"

namespace support {

template <typename Scalar>
inline constexpr long double kUnitRoundoff = std::numeric_limits<Scalar>::epsilon() / 2;

/// The bound of every kernel on standard normal operands (scores of order 1, the largest about 5), at any shape of the
/// grid. A score is a sum of d products, so rounding leaves it an absolute error of a few u·√d, which the exponential
/// turns into a relative error of the weight: that, not the softmax nor the product with V, is what fills the bound.
/// The worst seen in some thousand draws of the grid is 21, at d = 111; a naive evaluation in the same precision
/// reaches 19.
inline constexpr double kErrorFactor = 32;

/// Errors of all elements of a result, in units of u times their magnitude.
struct ErrorStatistics {
  double worst = 0;  // infinite if an element is not finite, or differs where the magnitude is 0
  double squares = 0;
  Eigen::Index count = 0;  // of elements with a magnitude

  double rms() const { return count == 0 ? 0 : std::sqrt(squares / static_cast<double>(count)); }

  template <typename Scalar, typename Out, typename Exact, typename Magnitude>
  void add(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Exact>& exact,
           const Eigen::MatrixBase<Magnitude>& magnitude) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    if (out.rows() != exact.rows() || out.cols() != exact.cols()) worst = kInfinity;
    if (worst == kInfinity) return;
    for (Eigen::Index i = 0; i < out.rows(); ++i) {
      for (Eigen::Index j = 0; j < out.cols(); ++j) {
        const auto scale = kUnitRoundoff<Scalar> * static_cast<long double>(magnitude(i, j));
        const long double difference = static_cast<long double>(out(i, j)) - static_cast<long double>(exact(i, j));
        if (scale > 0) ++count;
        if (difference == 0) continue;
        const auto error = static_cast<double>(std::abs(difference) / scale);
        squares += error * error;
        worst = std::isfinite(error) ? std::max(worst, error) : kInfinity;
        if (worst == kInfinity) return;
      }
    }
  }
};

/// ErrorStatistics::worst of one result.
template <typename Scalar, typename Out, typename Exact, typename Magnitude>
double worst_error(const Eigen::MatrixBase<Out>& out, const Eigen::MatrixBase<Exact>& exact,
                   const Eigen::MatrixBase<Magnitude>& magnitude) {
  ErrorStatistics statistics;
  statistics.add<Scalar>(out, exact, magnitude);
  return statistics.worst;
}

/// The same shape and the same bits but for the sign of 0; NaN is equal to nothing.
template <typename A, typename B>
bool identical(const Eigen::MatrixBase<A>& a, const Eigen::MatrixBase<B>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() && a == b;
}

}  // namespace support
