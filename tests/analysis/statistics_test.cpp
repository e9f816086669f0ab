// Maps whose entropy, support, negative mass and shares are known.

#include <array>
#include <cmath>
#include <cstddef>
#include <diffattn/analysis/statistics.hpp>
#include <limits>
#include <span>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "support/tolerances.hpp"

namespace {

using namespace diffattn;
using support::identical;
using support::thrown_by;

template <typename S>
constexpr S kNan = std::numeric_limits<S>::quiet_NaN();
template <typename S>
constexpr S kInfinity = std::numeric_limits<S>::infinity();

/// Each value within a few roundings of what it should be.
template <typename S>
void check_values(const Vector<S>& values, const std::vector<double>& expected) {
  REQUIRE(values.size() == static_cast<Index>(expected.size()));
  for (Index i = 0; i < values.size(); ++i) {
    CAPTURE(i);
    const double wanted = expected[static_cast<std::size_t>(i)];
    CHECK(std::abs(static_cast<double>(values(i)) - wanted) <=
          4 * static_cast<double>(std::numeric_limits<S>::epsilon()) * wanted);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("entropy and support of rows that are known", "[analysis]", float, double, long double) {
  using S = TestType;
  Matrix<S> map(8, 4);
  map << S(0.25), S(0.25), S(0.25), S(0.25),  // spread evenly
      0, 0, 1, 0,                             // on one key
      S(0.5), 0, 0, S(0.5),                   // 0·log 0 = 0
      S(0.5), S(0.25), S(0.125), S(0.125),    // 7/4 · log 2
      0, 0, 0, 0,                             // sees no key
      S(0.5), S(-0.5), S(0.5), S(-0.5),       // signs do not count
      0, S(-0.125), 0, 0,                     // nor does the sum, here on one key,
      7, 7, 7, 0;                             // here on three
  const double log_2 = std::log(2.0);
  check_values<S>(row_entropy(map), {2 * log_2, 0, log_2, 1.75 * log_2, 0, 2 * log_2, 0, std::log(3.0)});
  check_values<S>(effective_support(map), {4, 1, 2, std::pow(2.0, 1.75), 0, 4, 1, 3});
  STATIC_REQUIRE(std::is_same_v<decltype(row_entropy(map)), Vector<S>>);
}

TEMPLATE_TEST_CASE("entropy of random rows is that of its definition", "[analysis]", float, double) {
  using S = TestType;
  auto rng = support::make_rng();
  const Matrix<S> map = support::random_matrix<S>(20, 300, rng);
  const Vector<S> entropy = row_entropy(map), support = effective_support(map);
  for (Index i = 0; i < map.rows(); ++i) {
    long double sum = 0, exact = 0;
    for (Index j = 0; j < map.cols(); ++j) sum += std::abs(static_cast<long double>(map(i, j)));
    for (Index j = 0; j < map.cols(); ++j) {
      const long double p = std::abs(static_cast<long double>(map(i, j))) / sum;
      if (p > 0) exact -= p * std::log(p);
    }
    CHECK(std::abs(static_cast<long double>(entropy(i)) / exact - 1) <= 2 * std::numeric_limits<S>::epsilon() + 1e-14L);
    CHECK(std::abs(static_cast<long double>(support(i)) / std::exp(exact) - 1) <=
          2 * std::numeric_limits<S>::epsilon() + 1e-13L);
  }
}

TEMPLATE_TEST_CASE("no row is too large, too small or too long for its entropy", "[analysis]", float, double) {
  using S = TestType;
  const S most = std::numeric_limits<S>::max(), least = std::numeric_limits<S>::denorm_min();
  Matrix<S> map(2, 3);
  map << most, -most, most, least, 0, least;
  check_values<S>(row_entropy(map), {std::log(3.0), std::log(2.0)});

  // So many equal weights, added up one after another in float, would be off by a thousandth.
  const Index keys = 300'000;
  const auto mass = static_cast<double>(negative_mass(Matrix<S>::Constant(1, keys, S(-0.1)))(0));
  CHECK(std::abs(mass / (static_cast<double>(keys) * static_cast<double>(S(0.1))) - 1) <= 1e-7);
  check_values<S>(effective_support(Matrix<S>::Constant(1, keys, S(1) / static_cast<S>(keys))), {double(keys)});
}

TEMPLATE_TEST_CASE("negative mass is what a difference takes away", "[analysis]", float, double, long double) {
  using S = TestType;
  Matrix<S> p1(4, 3), p2(4, 3);
  p1 << S(0.25), S(0.25), S(0.5), 1, 0, 0, S(0.5), S(0.5), 0, 0, 0, 0;
  p2 << S(0.25), S(0.5), S(0.25), 0, 1, 0, S(0.5), S(0.5), 0, 0, 0, 0;
  check_values<S>(negative_mass(p1), {0, 0, 0, 0});
  check_values<S>(negative_mass(p1 - p2), {0.25, 1, 0, 0});
  check_values<S>(negative_mass(p1 - S(0.5) * p2), {0, 0.5, 0, 0});
  check_values<S>(negative_mass(-p2), {1, 1, 1, 0});

  // What is positive sums to 1 − λ and that.
  const S lambda = S(0.75);
  const Matrix<S> difference = p1 - lambda * p2;
  const Vector<S> positive = difference.cwiseMax(S(0)).rowwise().sum();
  check_values<S>(negative_mass(difference),
                  {static_cast<double>(positive(0)) - 0.25, static_cast<double>(positive(1)) - 0.25, 0, 0});
}

TEMPLATE_TEST_CASE("the share of rows and columns", "[analysis]", float, double, long double) {
  using S = TestType;
  Matrix<S> map(3, 4);
  map << S(0.5), S(0.25), S(0.125), S(0.125),  // a softmax
      0, 0, 0, 1,                              // another
      S(0.75), S(-0.25), 0, S(0.125);          // a difference
  CHECK(attention_share(map, {0}, {0}) == S(0.5));
  CHECK(attention_share(map, {0}, {3, 1}) == S(0.375));
  CHECK(attention_share(map, {0, 1}, {2, 3}) == S(0.625));  // a mean over rows, each of which gives its sum
  CHECK(attention_share(map, {1, 0, 0}, {3}) == S(1.25) / 3);
  CHECK(attention_share(map, {2}, {0, 1}) == S(0.5));          // with signs
  CHECK(attention_share(map, {2}, {0, 1, 2, 3}) == S(0.625));  // 1 − λ
  CHECK(attention_share(map, {0, 1}, {}) == 0);

  // Ranges of any integers.
  const std::vector<int> rows = {0, 1};
  const std::vector<std::size_t> columns = {2, 3};
  const std::array<short, 2> short_rows = {0, 1};
  Vector<Index> column_vector(2);
  column_vector << 2, 3;
  CHECK(attention_share(map, rows, columns) == S(0.625));
  CHECK(attention_share(map, short_rows, column_vector) == S(0.625));
  CHECK(attention_share(map, std::span<const int>(rows).first(1), {2, 3}) == S(0.25));
  STATIC_REQUIRE(std::is_same_v<decltype(attention_share(map, rows, columns)), S>);
}

TEST_CASE("attention_share names the row or column that is not there", "[analysis]") {
  const Matrix<float> map = Matrix<float>::Ones(3, 4);
  const auto refused = [&](const std::vector<int>& rows, const std::vector<int>& columns) {
    return thrown_by<std::invalid_argument>([&] { (void)attention_share(map, rows, columns); });
  };
  CHECK(refused({0, 3}, {0}) == "attention_share: query row 3 is out of range: the map has 3 rows");
  CHECK(refused({-1}, {0}) == "attention_share: query row -1 is out of range: the map has 3 rows");
  CHECK(refused({0}, {3, 4}) == "attention_share: key column 4 is out of range: the map has 4 columns");
  CHECK(refused({0}, {-2}) == "attention_share: key column -2 is out of range: the map has 4 columns");
  CHECK(refused({0}, {1, 3, 1}) == "attention_share: key column 1 is named twice");
  CHECK(refused({}, {1}) == "attention_share: there are no query rows, and no mean over them");
  CHECK(attention_share(map, {2}, {3}) == 1);
}

TEMPLATE_TEST_CASE("NaN stays in its row, wherever it is", "[analysis]", float, double) {
  using S = TestType;
  for (const Index at : {0, 1, 4}) {
    CAPTURE(at);
    Matrix<S> map = Matrix<S>::Zero(3, 5);
    map.row(0).setConstant(S(0.2));
    map(1, at) = kNan<S>;
    map(2, 3) = 1;
    for (const Vector<S>& values : {row_entropy(map), effective_support(map), negative_mass(map)}) {
      CHECK(std::isfinite(values(0)));
      CHECK(std::isnan(values(1)));
      CHECK(std::isfinite(values(2)));
    }
    CHECK(std::isnan(attention_share(map, {0, 1}, {at})));
    CHECK(attention_share(map, {0, 2}, {3}) == S(0.6));
    map(1, at) = -kInfinity<S>;
    CHECK(std::isnan(row_entropy(map)(1)));
    CHECK(std::isnan(effective_support(map)(1)));
    CHECK(negative_mass(map)(1) == kInfinity<S>);
  }
}

TEST_CASE("maps without rows or without columns", "[analysis]") {
  const Matrix<double> no_rows(0, 4), no_keys(3, 0);
  CHECK(row_entropy(no_rows).size() == 0);
  CHECK(effective_support(no_rows).size() == 0);
  CHECK(negative_mass(no_rows).size() == 0);
  check_values<double>(row_entropy(no_keys), {0, 0, 0});
  check_values<double>(effective_support(no_keys), {0, 0, 0});
  check_values<double>(negative_mass(no_keys), {0, 0, 0});
  CHECK(attention_share(no_keys, {1}, {}) == 0);
}

TEMPLATE_TEST_CASE("maps are read whatever expression they are", "[analysis]", float, double) {
  using S = TestType;
  auto rng = support::make_rng();
  const Matrix<S> map = support::random_matrix<S>(7, 9, rng);
  const Vector<S> entropy = row_entropy(map), support = effective_support(map), negative = negative_mass(map);
  const S share = attention_share(map, {1, 4}, {0, 8, 3});
  const auto same = [&](const auto& other) {
    CHECK(identical(row_entropy(other), entropy));
    CHECK(identical(effective_support(other), support));
    CHECK(identical(negative_mass(other), negative));
    CHECK(attention_share(other, {1, 4}, {0, 8, 3}) == share);
  };
  same(Eigen::Matrix<S, 7, 9>(map));
  same(Eigen::Array<S, Eigen::Dynamic, Eigen::Dynamic>(map));
  same(map.array() + S(0));
  same(map * Matrix<S>::Identity(9, 9));
  Matrix<S> frame = Matrix<S>::Constant(9, 20, kNan<S>);
  Eigen::Map<Matrix<S>, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>> strided(&frame(1, 1), 7, 9, {20, 2});
  strided = map;
  same(strided);
  const Matrix<S> transposed = map.transpose();
  same(transposed.transpose());
  CHECK(row_entropy(map.row(3))(0) == entropy(3));
}
