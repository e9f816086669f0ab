#pragma once

// Seeded random numbers that are the same on every machine: the standard library's distributions differ from one
// implementation to the next. The generator is SplitMix64 (Steele et al., OOPSLA 2014). Its whole state is one number:
// save it, and the numbers go on from there.

#include <cstdint>

#include "diffattn/core/matrix.hpp"

namespace diffattn::inline v0_1 {

/// A random number generator. Equal seeds give equal numbers.
class SplitMix64 {
 public:
  /// Any seed will do.
  explicit SplitMix64(std::uint64_t seed = 0) : state(seed) {}

  /// The next 64 random bits.
  std::uint64_t next() {
    std::uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  /// Uniform in [0, 1), 53 random bits.
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

  /// Uniform in [0, count), count >= 1, every value equally likely.
  Index below(Index count) {
    const auto n = static_cast<std::uint64_t>(count);
    const std::uint64_t surplus = (0 - n) % n;  // 2^64 mod n: that many draws would favour small values
    std::uint64_t draw = next();
    while (draw < surplus) draw = next();
    return static_cast<Index>(draw % n);
  }

  std::uint64_t state;  ///< all that the next numbers follow from
};

}  // namespace diffattn::inline v0_1
