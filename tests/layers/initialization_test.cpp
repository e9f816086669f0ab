#include <diffattn/layers/initialization.hpp>

#include "layers/layer_checks.hpp"

using diffattn::Initializer;
using diffattn::Matrix;

TEST_CASE("The initializer's numbers are the same everywhere, for ever", "[layers][initialization]") {
  // SplitMix64 seeded with 1234567 as published; 53 bits of each make a number in [0, 1).
  const std::uint64_t published[] = {6457827717110365317u, 3203168211198807973u, 9817491932198370423u,
                                     4593380528125082431u, 16408922859458223821u};
  Eigen::Matrix<double, 1, 5> uniform;
  Initializer(1234567).uniform(uniform, 2.0);
  for (int i = 0; i < 5; ++i) {
    CHECK(uniform(i) == 2.0 * (2 * std::ldexp(static_cast<double>(published[i] >> 11), -53) - 1));
  }
}

TEST_CASE("Uniform and normal numbers have the moments they should", "[layers][initialization]") {
  Matrix<double> m(300, 300);
  const double n = 90000;
  Initializer random(7);
  random.uniform(m, 0.5);
  layer_checks::check_uniform(m, 0.5);

  random.normal(m, 0.1);
  const auto unit = (m / 0.1).array().eval();
  CHECK(unit.isFinite().all());
  CHECK(std::abs(unit.mean()) < 5 / std::sqrt(n));
  CHECK(std::abs(unit.square().mean() - 1) < 5 * std::sqrt(2 / n));
  CHECK(std::abs(unit.cube().mean()) < 5 * std::sqrt(15 / n));
  CHECK(std::abs(unit.square().square().mean() - 3) < 5 * std::sqrt(96 / n));
  // Neighbours are independent.
  const Eigen::Map<const Eigen::ArrayXd> flat(unit.data(), unit.size());
  CHECK(std::abs((flat.head(89999) * flat.tail(89999)).mean()) < 5 / std::sqrt(n));
}

TEST_CASE("A seed fixes the numbers, in the order of the matrix's memory", "[layers][initialization]") {
  Matrix<double> matrix(4, 6), other(4, 6);
  diffattn::Vector<double> column(24);
  Initializer(3).normal(matrix, 1);
  Initializer(3).normal(column, 1);
  Initializer(4).normal(other, 1);
  CHECK(identical(matrix.reshaped<Eigen::RowMajor>(), column));
  CHECK_FALSE(identical(matrix, other));
}
