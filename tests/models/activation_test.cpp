#include <cmath>
#include <diffattn/models/activation.hpp>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/scalars.hpp"

namespace activation_test {

using diffattn::Activation;
using diffattn::Index;

constexpr Activation kAll[] = {Activation::gelu, Activation::gelu_tanh, Activation::relu};

/// f and f', from the formulas in activation.hpp.
struct Exact {
  long double value, slope;
};

inline Exact exact(Activation activation, long double x) {
  const long double pi = std::acos(-1.0L);
  if (activation == Activation::relu) return {x > 0 ? x : 0, x > 0 ? 1.0L : 0.0L};
  if (activation == Activation::gelu) {
    const long double phi = std::erfc(-x / std::sqrt(2.0L)) / 2;
    return {x * phi, phi + x * std::exp(-x * x / 2) / std::sqrt(2 * pi)};
  }
  const long double inner = std::sqrt(2 / pi) * (x + 0.044715L * x * x * x);
  const long double half = 1 / (1 + std::exp(-2 * inner));
  return {x * half, half + x * half * (1 - half) * 2 * std::sqrt(2 / pi) * (1 + 3 * 0.044715L * x * x)};
}

template <typename S>
void activate(Activation activation, std::vector<S>& values, std::vector<S>& slopes) {
  const std::vector<S> x = values;
  slopes.assign(x.size(), S(1));
  diffattn::detail::activate_values(activation, values.data(), values.data(), static_cast<Index>(x.size()));
  diffattn::detail::multiply_by_slope(activation, slopes.data(), x.data(), static_cast<Index>(x.size()));
}

}  // namespace activation_test

TEMPLATE_TEST_CASE("Activations and their slopes are the formulas", "[models][activation]", DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  using namespace activation_test;
  const long double u = std::numeric_limits<S>::epsilon() / 2;
  for (const Activation activation : kAll) {
    INFO("activation " << static_cast<int>(activation));
    std::vector<S> x;
    for (int i = -2000; i <= 2000; ++i) x.push_back(static_cast<S>(i) * static_cast<S>(0.0237));
    for (const double more : {0.0, 1e-30, -1e-30, 1e-5, -1e-5, 60.0, -60.0, 1e4, -1e4, 1e30, -1e30}) {
      x.push_back(static_cast<S>(more));
    }
    std::vector<S> y = x, slopes;
    activate(activation, y, slopes);
    long double worst = 0, worst_tail = 0, worst_slope = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const auto x_i = static_cast<long double>(x[i]);
      const Exact expected = exact(activation, x_i);
      const long double error = std::abs(y[i] - expected.value);
      worst = std::max(worst, error / std::max(1.0L, std::abs(x_i)));
      if (x_i < -1e-3L && x_i > -6) worst_tail = std::max(worst_tail, error / -expected.value);
      worst_slope = std::max(worst_slope, std::abs(slopes[i] - expected.slope));
    }
    CHECK(worst <= 2.5L * u);
    CHECK(worst_slope <= 5 * u);
    if (activation != Activation::relu) CHECK(worst_tail <= 130 * u);
  }
}

TEMPLATE_TEST_CASE("Activations of what is no number, or without end", "[models][activation]", DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  using namespace activation_test;
  const S infinity = std::numeric_limits<S>::infinity();
  for (const Activation activation : kAll) {
    INFO("activation " << static_cast<int>(activation));
    std::vector<S> y = {std::numeric_limits<S>::quiet_NaN(), infinity, -infinity, S(0)}, slopes;
    activate(activation, y, slopes);
    CHECK(std::isnan(y[0]));
    CHECK(y[1] == infinity);
    CHECK(std::abs(y[2]) < S(1e-35));
    CHECK(y[3] == 0);
    CHECK(slopes[1] == 1);
    CHECK(std::abs(slopes[2]) < S(1e-30));
    CHECK(slopes[3] == (activation == Activation::relu ? S(0) : S(0.5)));
    if (activation != Activation::relu) CHECK(std::isnan(slopes[0]));
  }
}

TEST_CASE("An activation does not depend on where a number stands", "[models][activation]") {
  using namespace activation_test;
  for (const Activation activation : kAll) {
    std::vector<float> x;
    for (int i = 0; i < 75; ++i) x.push_back(std::sin(static_cast<float>(i * i)) * 4);
    std::vector<float> all = x, slopes;
    activate(activation, all, slopes);
    for (std::size_t first = 0; first < x.size(); ++first) {
      std::vector<float> tail(x.begin() + static_cast<std::ptrdiff_t>(first), x.end()), tail_slopes;
      activate(activation, tail, tail_slopes);
      REQUIRE(tail == std::vector<float>(all.begin() + static_cast<std::ptrdiff_t>(first), all.end()));
      REQUIRE(tail_slopes == std::vector<float>(slopes.begin() + static_cast<std::ptrdiff_t>(first), slopes.end()));
    }
  }
}
