#pragma once

// Random operands. Every draw follows from Catch2's seed, which main.cpp prints: --rng-seed repeats a run.

#include <random>

#include "diffattn/core/matrix.hpp"
#include "support/catch.hpp"

namespace support {

using Rng = std::mt19937_64;

/// The engine of one test case; `stream` tells several in it apart.
inline Rng make_rng(unsigned stream = 0) { return Rng((std::uint64_t{stream} << 32) + Catch::getSeed()); }

/// N(0, 1) in every entry.
template <typename Scalar>
diffattn::Matrix<Scalar> random_matrix(diffattn::Index rows, diffattn::Index cols, Rng& rng) {
  std::normal_distribution<double> normal;
  diffattn::Matrix<Scalar> matrix(rows, cols);
  for (diffattn::Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = static_cast<Scalar>(normal(rng));
  return matrix;
}

}  // namespace support
