#pragma once

// Seeded random numbers for initial weights. The engine is the standard's, bit for bit; the distributions are our own,
// because those of the standard library differ from one implementation to the next.

#include <cmath>
#include <cstdint>
#include <numbers>
#include <random>

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

class Initializer {
 public:
  explicit Initializer(std::uint64_t seed) : engine_(seed) {}

  /// U(-bound, bound) in every entry, row by row.
  template <typename Derived>
  void uniform(Eigen::MatrixBase<Derived>& matrix, double bound) {
    fill(matrix, [&] { return bound * (2 * unit() - 1); });
  }

  /// N(0, deviation²) in every entry, row by row (Box and Muller).
  template <typename Derived>
  void normal(Eigen::MatrixBase<Derived>& matrix, double deviation) {
    fill(matrix, [&] {
      const double radius = std::sqrt(-2 * std::log1p(-unit()));
      return deviation * radius * std::cos(2 * std::numbers::pi * unit());
    });
  }

 private:
  /// Uniform in [0, 1), 53 random bits.
  double unit() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }

  template <typename Derived, typename Next>
  static void fill(Eigen::MatrixBase<Derived>& matrix, Next next) {
    for (Index i = 0; i < matrix.rows(); ++i) {
      for (Index j = 0; j < matrix.cols(); ++j) matrix(i, j) = static_cast<typename Derived::Scalar>(next());
    }
  }

  std::mt19937_64 engine_;
};

}  // namespace diffattn::inline v0_1
