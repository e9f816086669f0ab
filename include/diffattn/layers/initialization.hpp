#pragma once

// Random initial weights, the same for a seed on every machine.

#include <cmath>
#include <cstdint>
#include <numbers>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/random.hpp"

namespace diffattn::inline v0_1 {

class Initializer {
 public:
  explicit Initializer(std::uint64_t seed) : random_(seed) {}

  /// U(-bound, bound) in every entry, row by row.
  template <typename M>
  void uniform(M& matrix, double bound) {
    fill(matrix, [&] { return bound * (2 * random_.unit() - 1); });
  }

  /// N(0, deviation²) in every entry, row by row (Box and Muller).
  template <typename M>
  void normal(M& matrix, double deviation) {
    fill(matrix, [&] {
      const double radius = std::sqrt(-2 * std::log1p(-random_.unit()));
      return deviation * radius * std::cos(2 * std::numbers::pi * random_.unit());
    });
  }

 private:
  template <typename M, typename Draw>
  static void fill(M& matrix, Draw draw) {
    for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = static_cast<typename M::Scalar>(draw());
  }

  SplitMix64 random_;
};

}  // namespace diffattn::inline v0_1
