#include <bit>
#include <cmath>
#include <cstdint>
#include <diffattn/core/simd.hpp>

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

}  // namespace

TEST_CASE("Every bfloat16 and half is widened exactly", "[core][simd]") {
  CHECK(wrongly_widened<Eigen::bfloat16>() == 0);
  CHECK(wrongly_widened<Eigen::half>() == 0);
}
