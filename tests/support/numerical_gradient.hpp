#pragma once

// Gradients by differences, to hold backward passes against.

#include <algorithm>
#include <cmath>

#include "diffattn/core/matrix.hpp"

namespace support {

/// d f() / d x, element by element, from a stencil of four points: the error is of order h⁴. `x` is a matrix that f
/// reads, and is as it was afterwards.
template <typename M, typename F>
diffattn::Matrix<double> numerical_gradient(M& x, F&& f, double h = 1e-3) {
  diffattn::Matrix<double> gradient(x.rows(), x.cols());
  for (diffattn::Index i = 0; i < x.rows(); ++i) {
    for (diffattn::Index j = 0; j < x.cols(); ++j) {
      const double here = x(i, j);
      const auto at = [&](double steps) {
        x(i, j) = here + steps * h;
        return static_cast<double>(f());
      };
      gradient(i, j) = (at(-2) - 8 * at(-1) + 8 * at(1) - at(2)) / (12 * h);
      x(i, j) = here;
    }
  }
  return gradient;
}

/// The largest |a − b| − (atol + rtol·|b|): at most 0 where `a` is as close as gradcheck asks for.
template <typename A, typename B>
double excess(const Eigen::MatrixBase<A>& a, const Eigen::MatrixBase<B>& b, double rtol = 1e-6, double atol = 1e-8) {
  if (a.rows() != b.rows() || a.cols() != b.cols() || !a.allFinite() || !b.allFinite()) return HUGE_VAL;
  return a.size() == 0 ? -atol : ((a - b).array().abs() - (atol + rtol * b.array().abs())).maxCoeff();
}

}  // namespace support
