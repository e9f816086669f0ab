#pragma once

// RmsNorm: y = x / sqrt(mean(x²) + eps) · w for every row, as the official rms_norm.py has it: eps inside the root, no
// mean subtracted, w learned or absent.

#include <cmath>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/simd.hpp"
#include "diffattn/layers/parameters.hpp"

namespace diffattn::inline v0_1 {

template <typename Scalar>
class RmsNorm {
 public:
  explicit RmsNorm(Index width, double norm_eps = 1e-5, bool with_weight = true)
      : eps(norm_eps), weight(Vector<Scalar>::Ones(with_weight ? width : 0)), width_(width) {}

  Index width() const { return width_; }

  /// Normalises one row of `width()` contiguous values in place and multiplies it by `factor`.
  void apply(Scalar* row, Scalar factor = Scalar(1)) const {
    constexpr Index kLanes = simd::kLanes<Scalar>;
    auto packet_sum = simd::broadcast(Scalar(0));
    Index c = 0;
    for (; c + kLanes <= width_; c += kLanes) {
      const auto x = simd::loadu(row + c);
      packet_sum = simd::fma(x, x, packet_sum);
    }
    Scalar sum = simd::reduce_add(packet_sum);
    for (; c < width_; ++c) sum += row[c] * row[c];

    const Scalar scale = factor / std::sqrt(sum / static_cast<Scalar>(width_) + static_cast<Scalar>(eps));
    if (weight.size() == 0) {
      for (Index i = 0; i < width_; ++i) row[i] *= scale;
    } else {
      const Scalar* const w = weight.data();
      for (Index i = 0; i < width_; ++i) row[i] *= scale * w[i];
    }
  }

  /// y = norm(x), row by row. Throws ShapeError.
  template <typename X>
  Matrix<Scalar> forward(const Eigen::MatrixBase<X>& x) const {
    detail::check_shape("RmsNorm", "x", x, x.rows(), width_);
    Matrix<Scalar> y = x;
    for (Index i = 0; i < y.rows(); ++i) apply(y.row(i).data());
    return y;
  }

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    if (self.weight.size() != 0) visitor("weight", self.weight);
  }

  double eps;
  Vector<Scalar> weight;  ///< width, or empty

 private:
  Index width_;
};

}  // namespace diffattn::inline v0_1
