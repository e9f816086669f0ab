#include <array>
#include <cstdint>
#include <diffattn/core/random.hpp>

#include "support/catch.hpp"

using diffattn::Index;
using diffattn::SplitMix64;

TEST_CASE("SplitMix64 gives the numbers that its authors publish", "[core][random]") {
  SplitMix64 random(1234567);  // the first five of the sequence that other implementations test themselves with
  for (const std::uint64_t expected : {6457827717110365317U, 3203168211198807973U, 9817491932198370423U,
                                       4593380528125082431U, 16408922859458223821U}) {
    CHECK(random.next() == expected);
  }
}

TEST_CASE("A generator goes on from its state", "[core][random]") {
  SplitMix64 whole(7);
  for (int i = 0; i < 10; ++i) whole.next();
  SplitMix64 resumed(whole.state);
  for (int i = 0; i < 10; ++i) CHECK(whole.next() == resumed.next());
}

TEST_CASE("Draws are uniform", "[core][random]") {
  SplitMix64 random(3);
  std::array<int, 7> seen{};
  double sum = 0;
  constexpr int kDraws = 70000;
  for (int i = 0; i < kDraws; ++i) {
    const Index draw = random.below(7);
    REQUIRE(draw >= 0);
    REQUIRE(draw < 7);
    ++seen[static_cast<std::size_t>(draw)];
    const double unit = random.unit();
    REQUIRE(unit >= 0);
    REQUIRE(unit < 1);
    sum += unit;
  }
  for (const int count : seen) CHECK(std::abs(count - 10000) < 500);  // five standard deviations
  CHECK(std::abs(sum / kDraws - 0.5) < 0.006);
  CHECK(random.below(1) == 0);

  // 3·2^61: without rejection, 3/8 of all draws would fall into the first third.
  constexpr Index kHuge = Index{3} << 61;
  int low = 0;
  for (int i = 0; i < 9000; ++i) low += random.below(kHuge) < kHuge / 3 ? 1 : 0;
  CHECK(std::abs(low - 3000) < 250);
}
