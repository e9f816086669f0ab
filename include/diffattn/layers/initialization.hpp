#pragma once

// Seeded random numbers for initial weights, the same on every machine: the standard library's distributions differ
// from one implementation to the next, so both the engine (SplitMix64, Steele et al., OOPSLA 2014) and the
// distributions are our own.

#include <cmath>
#include <cstdint>
#include <numbers>

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

class Initializer {
 public:
  explicit Initializer(std::uint64_t seed) : state_(seed) {}

  /// U(-bound, bound) in every entry, row by row.
  template <typename M>
  void uniform(M& matrix, double bound) {
    fill(matrix, [&] { return bound * (2 * unit() - 1); });
  }

  /// N(0, deviation²) in every entry, row by row (Box and Muller).
  template <typename M>
  void normal(M& matrix, double deviation) {
    fill(matrix, [&] {
      const double radius = std::sqrt(-2 * std::log1p(-unit()));
      return deviation * radius * std::cos(2 * std::numbers::pi * unit());
    });
  }

 private:
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  /// Uniform in [0, 1), 53 random bits.
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

  template <typename M, typename Draw>
  static void fill(M& matrix, Draw draw) {
    for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = static_cast<typename M::Scalar>(draw());
  }

  std::uint64_t state_;
};

}  // namespace diffattn::inline v0_1
