// Pairs of bfloat16: rounding of every kind of float, and a multiply-add that is the same with and without the
// instruction.

#include "diffattn/core/simd_pairs.hpp"

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

namespace simd = diffattn::simd;
using diffattn::Index;

constexpr Index kPairLanes = simd::kLanes<float>;

/// The nearest bfloat16, of two that are as near the even one, found in double.
float pairs_nearest(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const float below = std::bit_cast<float>(bits & 0xffff0000u),
              above = std::bit_cast<float>((bits & 0xffff0000u) + 0x10000u);
  // The step from the largest bfloat16 is as if there were one above it: infinity from the middle on.
  const double top = std::isinf(above) ? std::copysign(0x1p128, x) : static_cast<double>(above);
  const double down = std::abs(double{x} - double{below}), up = std::abs(top - double{x});
  const bool even = (bits & 0x10000u) == 0;
  return down < up || (down == up && even) ? below : above;
}

float pairs_rounded(float x) {
  alignas(simd::kMostAlignment) float lanes[kPairLanes];
  simd::store(lanes, simd::round_to_bfloat16(simd::broadcast(x)));
  return lanes[kPairLanes - 1];
}

}  // namespace

TEST_CASE("Float is rounded to the nearest bfloat16, ties to even, infinities and NaN kept", "[core][simd]") {
  const auto of_bits = [](std::uint32_t bits) { return std::bit_cast<float>(bits); };
  std::vector<float> values = {0.0f,
                               -0.0f,
                               1.0f,
                               1e-45f,
                               -3e-39f,
                               std::numeric_limits<float>::max(),
                               of_bits(0x3f808000),
                               of_bits(0x3f818000),
                               of_bits(0x3f808001),
                               of_bits(0x3f817fff),
                               of_bits(0x7f7f7fff),
                               of_bits(0x7f7f8000),
                               of_bits(0xff7fffff),
                               of_bits(0x00008000)};
  auto rng = support::make_rng();
  for (int i = 0; i < 2000; ++i) values.push_back(of_bits(static_cast<std::uint32_t>(rng())));
  for (const float x : values) {
    if (std::isnan(x) || std::isinf(x)) continue;
    INFO(x);
    CHECK(std::bit_cast<std::uint32_t>(pairs_rounded(x)) == std::bit_cast<std::uint32_t>(pairs_nearest(x)));
  }
  CHECK(pairs_rounded(std::numeric_limits<float>::infinity()) == std::numeric_limits<float>::infinity());
  CHECK(pairs_rounded(-std::numeric_limits<float>::infinity()) == -std::numeric_limits<float>::infinity());
  // A NaN whose bits all lie in the half that goes, and those that a carry would make 0.
  for (const std::uint32_t nan : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu, 0x7fff8000u, 0x7fc00000u}) {
    CHECK(std::isnan(pairs_rounded(of_bits(nan))));
  }
}

TEST_CASE("A multiply-add of pairs adds both products to float sums", "[core][simd]") {
  auto rng = support::make_rng();
  std::uniform_real_distribution<float> numbers(-2, 2);
  alignas(simd::kMostAlignment) float a[2][kPairLanes], b[2][kPairLanes], c[kPairLanes], got[kPairLanes];
  for (int round = 0; round < 200; ++round) {
    for (Index i = 0; i < kPairLanes; ++i) {
      for (auto* values : {&a[0], &a[1], &b[0], &b[1]}) (*values)[i] = pairs_nearest(numbers(rng));
      c[i] = numbers(rng);
    }
    const auto left = simd::pairs_of(simd::load(a[0]), simd::load(a[1]));
    const auto right = simd::pairs_of(simd::load(b[0]), simd::load(b[1]));
    simd::store(got, simd::multiply_add(left, right, simd::load(c)));
    Index wrong = 0;
    for (Index i = 0; i < kPairLanes; ++i) {
      // Products are exact; the second is added first, whether an instruction does it or the text.
      const float second = static_cast<float>(double{a[1][i]} * double{b[1][i]} + double{c[i]});
      wrong += got[i] != static_cast<float>(double{a[0][i]} * double{b[0][i]} + double{second});
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("Pairs are made of two rows, or of neighbours in one", "[core][simd]") {
  alignas(simd::kMostAlignment) float values[2 * kPairLanes];
  Eigen::bfloat16 narrow[2 * kPairLanes];
  for (Index i = 0; i < 2 * kPairLanes; ++i) {
    values[i] = static_cast<float>(i + 1);
    narrow[i] = static_cast<Eigen::bfloat16>(values[i]);
  }
  const auto check = [](const simd::PairPacket& pairs, Index of_first, Index of_second, Index step) {
    alignas(simd::kMostAlignment) float first[kPairLanes], second[kPairLanes];
    simd::store(first, simd::first_of_pairs(pairs));
    simd::store(second, simd::second_of_pairs(pairs));
    Index wrong = 0;
    for (Index i = 0; i < kPairLanes; ++i) {
      wrong +=
          first[i] != static_cast<float>(of_first + i * step) || second[i] != static_cast<float>(of_second + i * step);
    }
    CHECK(wrong == 0);
  };
  check(simd::pairs_at(values), 1, 2, 2);
  check(simd::pairs_at(narrow), 1, 2, 2);
  check(simd::pairs_of(narrow, narrow + kPairLanes), 1, 1 + kPairLanes, 1);
  check(simd::pairs_of(simd::load(values), simd::load(values + kPairLanes)), 1, 1 + kPairLanes, 1);
}
