#include "diffattn/core/sizes.hpp"

#include <limits>

#include "support/catch.hpp"
#include "support/throws.hpp"

using diffattn::Index;
using diffattn::detail::check_operand_size;
using diffattn::detail::checked_product;
using diffattn::detail::kMostValues;

namespace {
std::string refusal(std::initializer_list<Index> factors) {
  return support::thrown_by<std::invalid_argument>([&] { checked_product("f", "a·b", factors); });
}
}  // namespace

TEST_CASE("A product of sizes is exact, or refused by name") {
  CHECK(checked_product("f", "a·b", {}) == 1);
  CHECK(checked_product("f", "a·b", {3, 5, 7}) == 105);
  CHECK(checked_product("f", "a·b", {0, Index{1} << 40, 2}) == 0);
  CHECK(checked_product("f", "a·b", {2, kMostValues / 2}) == kMostValues);
  constexpr Index kMax = std::numeric_limits<Index>::max();
  for (const Index a : {kMax, kMax / 2 + 1, Index{1} << 62, Index{1} << 47}) {
    for (const Index b : {Index{1}, Index{2}, Index{4}, a}) {
      CHECK(refusal({a, b}) == "f: a·b would be more than 70368744177664, which no memory holds");
      CHECK(refusal({b, a}) == "f: a·b would be more than 70368744177664, which no memory holds");
    }
  }
  CHECK(refusal({3, -1}) == "f: a·b cannot be made of -1");
  CHECK(refusal({std::numeric_limits<Index>::min(), 2}).find("f: a·b cannot be made of -9223372036854775808") == 0);
}

TEST_CASE("An operand is as large as memory may be, or refused with its size") {
  check_operand_size("f", "k", 0, 5);
  check_operand_size("f", "k", 5, 0);
  check_operand_size("f", "k", kMostValues / 16, 16);
  CHECK(support::thrown_by<std::invalid_argument>([] { check_operand_size("f", "k", Index{1} << 60, 16); }) ==
        "f: k would be 1152921504606846976 x 16 values, which no memory holds");
  CHECK_THROWS_AS(check_operand_size("f", "k", 16, Index{1} << 60), std::invalid_argument);
  CHECK_THROWS_AS(check_operand_size("f", "k", std::numeric_limits<Index>::max(), 0), std::invalid_argument);
}
