// 2^x for x <= 0: accuracy in units in the last place, and the ends of the range.
// `test_kernels [exhaustive]` tries every float in [-127, 0].

#include "diffattn/kernels/detail/exp2.hpp"

#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"

using diffattn::Index;
namespace simd = diffattn::simd;

namespace {

constexpr double kMaxUlp = 2;

template <typename Scalar>
struct Lanes {
  static constexpr Index kCount = simd::kLanes<Scalar>;
  alignas(64) Scalar values[kCount];
};

template <typename Scalar>
Lanes<Scalar> our_exp2(const Lanes<Scalar>& x, Scalar scale = 1) {
  Lanes<Scalar> result;
  simd::store(result.values, diffattn::detail::ScaledExp2<Scalar>(scale)(simd::load(x.values)));
  return result;
}

template <typename Scalar>
Scalar our_exp2(Scalar x) {
  Lanes<Scalar> lanes;
  for (Scalar& value : lanes.values) value = x;
  return our_exp2(lanes).values[0];
}

/// The distance from the exact result, in the spacing of the numbers around it.
template <typename Scalar, typename Wide>
double ulp(Scalar result, Wide exact) {
  int exponent;
  std::frexp(exact, &exponent);
  const Wide spacing = std::ldexp(Wide(1), exponent - std::numeric_limits<Scalar>::digits);
  return static_cast<double>(std::abs(static_cast<Wide>(result) - exact) / spacing);
}

/// The worst of many x in [lowest, 0].
template <typename Scalar>
double worst_ulp(Scalar lowest, int packets) {
  support::Rng rng = support::make_rng();
  std::uniform_real_distribution<Scalar> any(lowest, Scalar(0));
  double worst = 0;
  for (int i = 0; i < packets; ++i) {
    Lanes<Scalar> x;
    for (Scalar& value : x.values) value = any(rng);
    const Lanes<Scalar> y = our_exp2(x);
    for (Index lane = 0; lane < Lanes<Scalar>::kCount; ++lane) {
      worst = std::max(worst, ulp(y.values[lane], std::exp2(static_cast<long double>(x.values[lane]))));
    }
  }
  return worst;
}

}  // namespace

TEST_CASE("exp2 is within 2 ulp: float") {
  CHECK(worst_ulp<float>(-126, 200000) <= kMaxUlp);
  CHECK(worst_ulp<float>(-1, 50000) <= kMaxUlp);
  CHECK(worst_ulp<float>(-1e-4f, 50000) <= kMaxUlp);
}

TEST_CASE("exp2 is within 2 ulp: double") {
  CHECK(worst_ulp<double>(-1022, 200000) <= kMaxUlp);
  CHECK(worst_ulp<double>(-1, 50000) <= kMaxUlp);
  CHECK(worst_ulp<double>(-1e-9, 50000) <= kMaxUlp);
}

TEMPLATE_TEST_CASE("exp2 of a product is as good as of the product in more digits", "", DIFFATTN_TEST_SCALARS) {
  support::Rng rng = support::make_rng();
  std::uniform_real_distribution<TestType> any(-62, 0), any_scale(1, 2);
  double worst = 0;
  for (int i = 0; i < 20000; ++i) {
    const TestType scale = any_scale(rng);
    Lanes<TestType> x;
    for (TestType& value : x.values) value = any(rng);
    const Lanes<TestType> y = our_exp2(x, scale);
    for (Index lane = 0; lane < Lanes<TestType>::kCount; ++lane) {
      const long double product = static_cast<long double>(x.values[lane]) * static_cast<long double>(scale);
      worst = std::max(worst, ulp(y.values[lane], std::exp2(product)));
    }
  }
  // Where multiply and add are not fused, the product is rounded: half a unit of up to 128.
#ifdef __FP_FAST_FMA
  CHECK(worst <= kMaxUlp);
#else
  CHECK(worst <= 64);
#endif
}

TEMPLATE_TEST_CASE("exp2 is 0 below the normal numbers whatever the scale", "", DIFFATTN_TEST_SCALARS) {
  using Limits = std::numeric_limits<TestType>;
  for (const TestType scale : {TestType(1), TestType(1.442695), TestType(1.9999999)}) {
    Lanes<TestType> x;
    for (TestType& value : x.values) value = Limits::lowest();
    x.values[0] = -Limits::infinity();
    for (const TestType y : our_exp2(x, scale).values) CHECK(y == 0);
  }
}

TEMPLATE_TEST_CASE("exp2 is exact where it must be", "", DIFFATTN_TEST_SCALARS) {
  using Limits = std::numeric_limits<TestType>;
  CHECK(our_exp2(TestType(0)) == 1);
  CHECK(our_exp2(-TestType(0)) == 1);
  CHECK(our_exp2(-Limits::denorm_min()) == 1);
  for (int n = -1; n > Limits::min_exponent; --n) CHECK(our_exp2(TestType(n)) == std::ldexp(TestType(1), n));
}

TEMPLATE_TEST_CASE("exp2 is 0 below the normal numbers", "", DIFFATTN_TEST_SCALARS) {
  using Limits = std::numeric_limits<TestType>;
  const auto lowest = static_cast<TestType>(Limits::min_exponent - 1);  // 2^lowest is the smallest normal number
  CHECK(our_exp2(lowest - 1) == 0);
  CHECK(our_exp2(lowest - TestType(0.75)) == 0);
  CHECK(our_exp2(TestType(-5000)) == 0);
  CHECK(our_exp2(Limits::lowest()) == 0);
  CHECK(our_exp2(-Limits::infinity()) == 0);
}

TEMPLATE_TEST_CASE("exp2 keeps NaN, in its own lane", "", DIFFATTN_TEST_SCALARS) {
  Lanes<TestType> x;
  for (Index bad = 0; bad < Lanes<TestType>::kCount; ++bad) {
    for (TestType& value : x.values) value = -3;
    x.values[bad] = std::numeric_limits<TestType>::quiet_NaN();
    const Lanes<TestType> y = our_exp2(x);
    for (Index lane = 0; lane < Lanes<TestType>::kCount; ++lane) {
      if (lane == bad) {
        CHECK(std::isnan(y.values[lane]));
      } else {
        CHECK(y.values[lane] == TestType(0.125));
      }
    }
  }
}

TEST_CASE("exp2 of every float in [-127, 0]", "[.][exhaustive]") {
  double worst = 0;
  float worst_at = 0;
  const auto first = std::bit_cast<std::uint32_t>(-0.0f), last = std::bit_cast<std::uint32_t>(-127.0f);
  Lanes<float> x;
  for (std::uint32_t bits = first; bits <= last; bits += Lanes<float>::kCount) {
    for (Index lane = 0; lane < Lanes<float>::kCount; ++lane) {
      x.values[lane] = std::bit_cast<float>(std::min(bits + static_cast<std::uint32_t>(lane), last));
    }
    const Lanes<float> y = our_exp2(x);
    for (Index lane = 0; lane < Lanes<float>::kCount; ++lane) {
      const double exact = std::exp2(static_cast<double>(x.values[lane]));
      // Between the smallest normal number and half of it the result is either of them, or 0.
      if (exact < std::numeric_limits<float>::min()) {
        if (y.values[lane] != 0) CHECK(y.values[lane] <= std::numeric_limits<float>::min());
        continue;
      }
      const double error = ulp(y.values[lane], exact);
      if (!(error <= worst)) worst = error, worst_at = x.values[lane];
    }
  }
  CAPTURE(worst_at);
  CHECK(worst <= kMaxUlp);
  WARN("worst " << worst << " ulp, at " << worst_at);
}
