// a · b of any length, from any address.

#include "diffattn/product/dot.hpp"

#include <vector>

#include "product/plain.hpp"
#include "support/catch.hpp"
#include "support/scalars.hpp"

TEMPLATE_TEST_CASE("dot is the sum of the products, of any length and from any address", "[product]",
                   DIFFATTN_TEST_SCALARS) {
  using support::Index;
  support::Rng rng = support::make_rng();
  for (Index depth = 0; depth <= 150; ++depth) {
    for (const Index offset : {0, 1, 3}) {
      INFO("depth " << depth << ", offset " << offset);
      support::Matrix<TestType> values = support::whole_numbers<TestType>(2, offset + depth + 1, rng);
      // A neighbour that is read shows.
      values.col(offset + depth).setConstant(std::numeric_limits<TestType>::quiet_NaN());
      const TestType* const a = &values(0, offset);
      const TestType* const b = &values(1, offset);
      TestType expected = 0;
      for (Index k = 0; k < depth; ++k) expected += a[k] * b[k];
      CHECK(diffattn::detail::dot<TestType>(a, b, depth) == expected);
    }
  }
}

TEMPLATE_TEST_CASE("dot with a NaN anywhere is NaN", "[product]", DIFFATTN_TEST_SCALARS) {
  for (const support::Index depth : {1, 7, 16, 37, 70}) {
    std::vector<TestType> a(static_cast<std::size_t>(depth), TestType(0));
    const std::vector<TestType> b = a;
    for (TestType& value : a) {
      value = std::numeric_limits<TestType>::quiet_NaN();
      const TestType sum = diffattn::detail::dot<TestType>(a.data(), b.data(), depth);
      CHECK(sum != sum);
      value = 0;
    }
    CHECK(diffattn::detail::dot<TestType>(a.data(), b.data(), depth) == 0);
  }
}
