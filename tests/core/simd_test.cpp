#include <bit>
#include <cmath>
#include <cstdint>
#include <diffattn/core/simd.hpp>
#include <limits>

#include "support/catch.hpp"

namespace {

namespace simd = diffattn::simd;
using diffattn::Index;

/// Every value there is, widened as part of a packet, against Eigen's conversion of one. Returns how many differ.
template <typename T>
Index wrongly_widened() {
  constexpr Index kLanes = simd::kLanes<float>;
  Index wrong = 0;
  for (std::uint32_t first = 0; first < 65536; first += static_cast<std::uint32_t>(kLanes)) {
    T narrow[kLanes];
    alignas(64) float wide[kLanes];
    for (Index i = 0; i < kLanes; ++i) {
      narrow[i] = Eigen::numext::bit_cast<T>(static_cast<std::uint16_t>(first + static_cast<std::uint32_t>(i)));
    }
    simd::store(wide, simd::load_as<float>(narrow));
    for (Index i = 0; i < kLanes; ++i) {
      const auto expected = static_cast<float>(narrow[i]);
      const bool both_nan = std::isnan(expected) && std::isnan(wide[i]);
      if (!both_nan && std::bit_cast<std::uint32_t>(expected) != std::bit_cast<std::uint32_t>(wide[i])) ++wrong;
    }
  }
  return wrong;
}

/// Packets of doubles as Scalars, from an address of no alignment: each as the conversion of one gives it, and nothing
/// beside them.
template <typename Scalar>
void check_stored_as() {
  constexpr Index kLanes = simd::kLanes<double>;
  const double values[] = {0.1,    -1.0 / 3,     1 + 0x1p-24, 1 + 0x3p-24, 3e38,
                           -1e-46, 0x1p-140 / 3, -0.0,        HUGE_VAL,    16777217};
  for (const double value : values) {
    alignas(64) double wide[kLanes];
    for (Index i = 0; i < kLanes; ++i) wide[i] = i % 2 == 0 ? value : -value;
    alignas(64) Scalar narrow[kLanes + 2];
    for (Scalar& number : narrow) number = Scalar(77);
    simd::store_as(narrow + 1, simd::load(wide));
    for (Index i = 0; i < kLanes; ++i) {
      CAPTURE(value, i);
      CHECK(narrow[i + 1] == static_cast<Scalar>(wide[i]));
      CHECK(std::signbit(narrow[i + 1]) == std::signbit(wide[i]));
    }
    CHECK(narrow[0] == Scalar(77));
    CHECK(narrow[kLanes + 1] == Scalar(77));
  }
}

/// Every pair of values that compare in their own way, in every lane.
template <typename Scalar>
void check_select_equal() {
  constexpr Index kLanes = simd::kLanes<Scalar>;
  using Limits = std::numeric_limits<Scalar>;
  const Scalar values[] = {0,
                           -Scalar(0),
                           1,
                           Limits::denorm_min(),
                           Limits::lowest(),
                           Limits::infinity(),
                           -Limits::infinity(),
                           Limits::quiet_NaN()};
  for (const Scalar x : values) {
    for (const Scalar y : values) {
      for (Index lane = 0; lane < kLanes; ++lane) {
        alignas(64) Scalar left[kLanes], right[kLanes], selected[kLanes];
        for (Index i = 0; i < kLanes; ++i) {
          left[i] = i == lane ? x : Scalar(2);
          right[i] = i == lane ? y : Scalar(3);
        }
        simd::store(selected, simd::select_equal<Scalar>(simd::load(left), simd::load(right),
                                                         simd::broadcast(Scalar(5)), simd::broadcast(Scalar(7))));
        bool chosen = true;
        for (Index i = 0; i < kLanes; ++i) chosen &= selected[i] == (i == lane && x == y ? Scalar(5) : Scalar(7));
        CAPTURE(x, y, lane);
        CHECK(chosen);
      }
    }
  }
}

/// What is left of x² + (−x² rounded): 0 if the product is rounded before the sum.
template <typename Scalar>
Scalar left_of_a_square(int bits) {
  volatile Scalar x = 1 + std::ldexp(Scalar(1), -bits);
  const Scalar number = x;
  volatile Scalar rounded = number * number;
  const Scalar minus = -rounded;
  return simd::first(simd::fma(simd::broadcast(number), simd::broadcast(number), simd::broadcast(minus)));
}

}  // namespace

TEST_CASE("Doubles are stored in narrower types, rounded to nearest", "[core][simd]") {
  check_stored_as<float>();
  check_stored_as<double>();
}

TEST_CASE("Lanes are chosen where two packets are equal", "[core][simd]") {
  check_select_equal<float>();
  check_select_equal<double>();
}

TEST_CASE("A multiply-add rounds once where it says so", "[core][simd]") {
  if (!simd::kFusesMultiplyAdd) return;
  CHECK(left_of_a_square<float>(14) == 0x1p-28f);
  CHECK(left_of_a_square<double>(30) == 0x1p-60);
}

TEST_CASE("Every bfloat16 and half is widened exactly", "[core][simd]") {
  CHECK(wrongly_widened<Eigen::bfloat16>() == 0);
  CHECK(wrongly_widened<Eigen::half>() == 0);
}
