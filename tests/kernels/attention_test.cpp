// Standard attention of one head: the grid, laws, edges.

#include "diffattn/kernels/attention.hpp"

#include "kernels/edges.hpp"
#include "kernels/grid.hpp"
#include "kernels/laws.hpp"
#include "support/catch.hpp"
#include "support/scalars.hpp"
#include "support/throws.hpp"

using namespace support;

TEMPLATE_TEST_CASE("attention is exact to rounding on the grid", "", DIFFATTN_TEST_SCALARS) {
  const Errors errors = check_ranges<TestType>(Attention{});
  CAPTURE(errors.naive.worst);
  CHECK(errors.kernel.worst <= kErrorFactor);
}

TEMPLATE_TEST_CASE("attention with a bias is exact to rounding on the grid", "", DIFFATTN_TEST_SCALARS) {
  const Errors errors = check_biases<TestType>(Attention{});
  CAPTURE(errors.naive.worst);
  CHECK(errors.kernel.worst <= kErrorFactor);
}

TEMPLATE_TEST_CASE("attention obeys its laws", "", DIFFATTN_TEST_SCALARS) { check_all_laws<TestType>(Attention{}); }

TEMPLATE_TEST_CASE("attention: a row that sees no key is 0", "", DIFFATTN_TEST_SCALARS) {
  check_rows_without_keys<TestType>(Attention{});
}

TEMPLATE_TEST_CASE("attention of nothing is empty, and to nothing is 0", "", DIFFATTN_TEST_SCALARS) {
  check_empty_operands<TestType>(Attention{});
}

TEMPLATE_TEST_CASE("attention: NaN and Inf reach the rows that see them and no other", "", DIFFATTN_TEST_SCALARS) {
  check_not_finite<TestType>(Attention{});
}

TEMPLATE_TEST_CASE("attention holds at extreme and at equal scores", "", DIFFATTN_TEST_SCALARS) {
  check_extreme_scores<TestType>(Attention{});
  check_equal_scores<TestType>(Attention{});
}
