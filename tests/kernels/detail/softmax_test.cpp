// Weights, bases, sums and the combination of maps, each against its definition.

#include "diffattn/kernels/detail/softmax.hpp"

#include <cmath>
#include <limits>

#include "support/catch.hpp"
#include "support/scalars.hpp"

using diffattn::Index;
namespace detail = diffattn::detail;
namespace simd = diffattn::simd;

namespace {

/// Two packets of scores before and behind which nothing may change.
template <typename Scalar>
struct Row {
  static constexpr Index kLanes = simd::kLanes<Scalar>, kBegin = kLanes, kEnd = 3 * kLanes;
  alignas(64) Scalar values[4 * kLanes];

  explicit Row(Scalar step) {
    for (Index c = 0; c < 4 * kLanes; ++c) values[c] = step * static_cast<Scalar>(c % 5) - 3;
  }
};

}  // namespace

TEMPLATE_TEST_CASE("A row of scores becomes weights relative to its largest", "", DIFFATTN_TEST_SCALARS) {
  using R = Row<TestType>;
  const TestType c = TestType(1.25), hidden = -std::numeric_limits<TestType>::infinity();
  R row(TestType(0.5));
  row.values[R::kBegin] = hidden;
  const R before = row;
  const auto [base, sum] = detail::exponentiate_row(row.values, R::kBegin, R::kEnd, detail::ScaledExp2<TestType>(c));
  TestType largest = hidden, expected_sum = 0;
  for (Index i = R::kBegin; i < R::kEnd; ++i) largest = std::max(largest, before.values[i]);
  CHECK(base == largest);
  for (Index i = 0; i < 4 * R::kLanes; ++i) {
    if (i < R::kBegin || i >= R::kEnd) {
      CHECK(row.values[i] == before.values[i]);
      continue;
    }
    const TestType weight = std::exp2(c * (before.values[i] - largest));
    CHECK(row.values[i] == Approx(weight).epsilon(1e-6));
    expected_sum += weight;
  }
  CHECK(row.values[R::kBegin] == 0);
  CHECK(sum == Approx(expected_sum).epsilon(1e-6));
  CHECK(base == largest);
}

TEMPLATE_TEST_CASE("A row that sees no key has weights of 0, a sum of 0 and no probability", "",
                   DIFFATTN_TEST_SCALARS) {
  using R = Row<TestType>;
  R row(TestType(0));
  const TestType hidden = -std::numeric_limits<TestType>::infinity();
  for (TestType& value : row.values) value = hidden;
  const auto [base, sum] =
      detail::exponentiate_row(row.values, Index(0), R::kEnd, detail::ScaledExp2<TestType>(TestType(1.5)));
  for (Index i = 0; i < R::kEnd; ++i) CHECK(row.values[i] == 0);
  CHECK(sum == 0);
  CHECK(detail::normaliser(sum) == 0);
  CHECK(detail::normaliser(sum, TestType(-0.5)) == 0);
  CHECK(detail::normaliser(TestType(4), TestType(-2)) == TestType(-0.5));
  CHECK(base == detail::kNoBase<TestType>);
}

TEMPLATE_TEST_CASE("Maps are combined, in place and into another row", "", DIFFATTN_TEST_SCALARS) {
  using R = Row<TestType>;
  const R p1(TestType(0.25)), p2(TestType(0.5));
  R to(TestType(1)), in_place = p1;
  const R before = to;
  detail::combine_maps(to.values, p1.values, TestType(0.5), p2.values, TestType(-0.25), R::kBegin, R::kEnd);
  detail::combine_maps(in_place.values, p2.values, TestType(-0.25), in_place.values, TestType(0.5), R::kBegin, R::kEnd);
  for (Index i = 0; i < 4 * R::kLanes; ++i) {
    const bool inside = i >= R::kBegin && i < R::kEnd;
    const TestType combined = TestType(0.5) * p1.values[i] - TestType(0.25) * p2.values[i];  // exact
    CHECK(to.values[i] == (inside ? combined : before.values[i]));
    CHECK(in_place.values[i] == (inside ? combined : p1.values[i]));
  }
}
