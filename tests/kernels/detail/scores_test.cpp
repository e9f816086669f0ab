// From products to scores: what is masked, what is biased, and what is left alone.

#include "diffattn/kernels/detail/scores.hpp"

#include <array>
#include <limits>

#include "diffattn/core/simd.hpp"
#include "support/catch.hpp"
#include "support/scalars.hpp"

using diffattn::CausalMask;
using diffattn::FullMask;
using diffattn::Index;
using diffattn::KeyRange;
namespace detail = diffattn::detail;

namespace {

constexpr float kHiddenScore = -std::numeric_limits<float>::infinity();

/// head + key, and -inf for key 6.
struct HeadAndKey {
  double operator()(Index head, Index /*query*/, Index key, Index /*n_q*/, Index /*n_k*/) const {
    return key == 6 ? -std::numeric_limits<double>::infinity() : static_cast<double>(head + key);
  }
};

/// Four rows of products, all 1, of queries 2 … 5 of 6 and keys 4 … 35 of 8: two packets of any size.
struct Products {
  static constexpr Index kStride = 32, kPacket = 16;
  alignas(diffattn::simd::kMostAlignment) std::array<float, 4 * kStride> values{};
  Products() { values.fill(1); }

  template <typename Mask>
  void finish(const Mask& mask, const KeyRange& columns, float scale) {
    const detail::RowRange<Mask> rows{mask, 3, 2, 4, 6, 8};
    detail::finish_scores(values.data(), kStride, rows, 4, columns, detail::split_scale<Mask>(scale));
  }
  float operator()(Index r, Index c) const { return values[static_cast<std::size_t>(r * kStride + c)]; }
};

}  // namespace

TEST_CASE("Scores of keys that a row does not see are -inf, others stay as they are", "[kernels]") {
  Products x;
  x.finish(CausalMask{}, {0, 8}, 0.5f);
  for (Index r = 0; r < 4; ++r) {
    for (Index c = 0; c < 8; ++c) {
      CAPTURE(r, c);
      CHECK(x(r, c) == (c + 4 <= r + 2 + 8 - 6 ? 1 : kHiddenScore));
    }
    CHECK(x(r, 8) == 1);
  }
}

TEST_CASE("Only the columns that are asked for become scores", "[kernels]") {
  Products x;
  x.finish(CausalMask{}, {2, 3}, 0.5f);
  for (Index r = 0; r < 4; ++r) {
    CHECK(x(r, 1) == 1);
    CHECK(x(r, 2) == (r < 2 ? kHiddenScore : 1));
    CHECK(x(r, 3) == 1);
  }
}

TEST_CASE("A bias is told the head, added to the scaled product, and may hide a key", "[kernels]") {
  Products x;
  const auto mask = diffattn::with_bias(FullMask{}, HeadAndKey{});
  x.finish(mask, {0, Products::kPacket}, 0.5f);
  for (Index r = 0; r < 4; ++r) {
    CHECK(x(r, Products::kPacket) == 1);
    for (Index c = 0; c < Products::kPacket; ++c) {
      CAPTURE(r, c);
      const Index key = 4 + c;
      CHECK(x(r, c) == (key == 6 || key >= 8 ? kHiddenScore : 0.5f + static_cast<float>(3 + key)));
    }
  }
}

TEST_CASE("What is hidden is cleared, by range and by bias", "[kernels]") {
  Products x;
  const auto mask = diffattn::with_bias(CausalMask{}, HeadAndKey{});
  const detail::RowRange<decltype(mask)> rows{mask, 3, 2, 4, 6, 8};
  const KeyRange columns{0, Products::kPacket};
  alignas(diffattn::simd::kMostAlignment) std::array<float, 4 * Products::kStride> biases{};
  detail::fill_biases(biases.data(), Products::kStride, rows, 4, columns);
  detail::clear_hidden(x.values.data(), Products::kStride, rows, 4, columns, biases.data());
  for (Index r = 0; r < 4; ++r) {
    CHECK(x(r, Products::kPacket) == 1);
    for (Index c = 0; c < Products::kPacket; ++c) {
      CAPTURE(r, c);
      CHECK(x(r, c) == (c + 4 <= r + 4 && c != 2 ? 1 : 0));
    }
  }
}

TEMPLATE_TEST_CASE("The parts of a scale multiply to it", "", DIFFATTN_TEST_SCALARS) {
  for (const double s : {0.125, -0.3, 1.0, 7.7, 1e-30}) {
    CAPTURE(s);
    const auto scale = static_cast<TestType>(s);
    const auto parts = detail::split_scale<FullMask>(scale);
    int exponent = 0;
    CHECK(std::abs(std::frexp(parts.of_queries, &exponent)) == TestType(0.5));  // exact
    CHECK(parts.of_exponent >= 1);
    CHECK(parts.of_exponent < 2);
    CHECK(parts.of_queries * parts.of_exponent == Approx(s * 1.4426950408889634).epsilon(1e-6));
  }
}
