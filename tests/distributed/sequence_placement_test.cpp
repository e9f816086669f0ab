// Which rows of a sequence are on which rank.

#include "diffattn/distributed/sequence_placement.hpp"

#include <algorithm>
#include <limits>

#include "support/catch.hpp"
#include "support/throws.hpp"

using diffattn::Index;
using diffattn::Matrix;
using diffattn::SequencePlacement;

TEST_CASE("Pieces cover the sequence, and every rank has an early and a late one", "[distributed]") {
  for (Index ranks = 1; ranks <= 7; ++ranks) {
    for (Index rows = ranks; rows <= 5 * ranks; ++rows) {
      INFO(rows << " rows on " << ranks << " ranks");
      std::vector<Index> owners(static_cast<std::size_t>(rows), -1);
      for (Index rank = 0; rank < ranks; ++rank) {
        const SequencePlacement placement(rows, ranks, rank);
        CHECK(placement.first_of_piece(2 * ranks) == rows);
        CHECK(placement.mine() >= 1);
        CHECK(placement.mine() <= rows / ranks + 2);
        Index before = -1;
        for (Index row = 0; row < placement.mine(); ++row) {
          const Index position = placement.position(row);
          CHECK(position > before);
          REQUIRE(position < rows);
          Index& owner = owners[static_cast<std::size_t>(position)];
          CHECK(owner == -1);
          owner = rank;
          CHECK(placement.rank_of(position) == rank);
          before = position;
        }
        placement.for_each_piece([&](Index first, Index count, Index position) {
          for (Index i = 0; i < count; ++i) CHECK(placement.position(first + i) == position + i);
        });
      }
      CHECK(std::count(owners.begin(), owners.end(), -1) == 0);
    }
  }
}

TEST_CASE("Pairs of a query and a key are counted as the mask lets them be seen", "[distributed]") {
  const SequencePlacement first(9, 2, 0), second(9, 2, 1);  // rows 0, 1, 2, 7, 8 and 3 to 6
  CHECK(first.visible_pairs(diffattn::CausalMask{}) == 1 + 2 + 3 + 8 + 9);
  CHECK(second.visible_pairs(diffattn::CausalMask{}) == 4 + 5 + 6 + 7);
  CHECK(first.visible_pairs(diffattn::FullMask{}) == 5 * 9);
  CHECK(first.visible_pairs(diffattn::SlidingWindowMask{2}) == 1 + 2 + 2 + 2 + 2);
  CHECK(second.visible_pairs(diffattn::PaddingMask{4}) == 4 * 4);
}

namespace {

/// How much more than the idlest the busiest rank has to do, as a share.
template <typename Mask>
double imbalance(Index rows, Index ranks, const Mask& mask) {
  Index most = 0, least = std::numeric_limits<Index>::max();
  for (Index rank = 0; rank < ranks; ++rank) {
    const Index pairs = SequencePlacement(rows, ranks, rank).visible_pairs(mask);
    most = std::max(most, pairs);
    least = std::min(least, pairs);
  }
  return static_cast<double>(most - least) / static_cast<double>(most);
}

}  // namespace

TEST_CASE("Ranks have the same work", "[distributed]") {
  CHECK(imbalance(16384, 2, diffattn::CausalMask{}) == 0);
  for (const Index ranks : {2, 3, 4, 8}) {
    for (const Index rows : {1600, 1601, 1607, 16384}) {
      INFO(rows << " rows on " << ranks << " ranks");
      CHECK(imbalance(rows, ranks, diffattn::CausalMask{}) <= 0.01);
      CHECK(imbalance(rows, ranks, diffattn::FullMask{}) <= 0.01);
    }
    // The first rows see less than a window: of a long sequence that is little.
    CHECK(imbalance(16384, ranks, diffattn::SlidingWindowMask{64}) <= 0.05);
  }
}

TEST_CASE("The rows and elements of a rank", "[distributed]") {
  const SequencePlacement placement(9, 2, 1);  // pieces of 3, 2, 2, 2
  Matrix<float> x(9, 2);
  for (Index i = 0; i < 9; ++i) x.row(i).setConstant(static_cast<float>(i));
  Matrix<float> mine(4, 2);
  mine << 3, 3, 4, 4, 5, 5, 6, 6;
  CHECK(placement.rows_of(x) == mine);
  CHECK(placement.elements_of(std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7, 8}) == std::vector<int>{3, 4, 5, 6});
  CHECK(support::thrown_by<diffattn::ShapeError>([&] { placement.rows_of(mine); }) ==
        "SequencePlacement: x must be 9 x 2, got 4 x 2");
  CHECK(support::thrown_by<diffattn::ShapeError>([&] { placement.elements_of(std::vector<int>{1}); }) ==
        "SequencePlacement: the elements must be 9 x 1, got 1 x 1");
  CHECK(support::thrown_by<std::invalid_argument>([] { SequencePlacement(3, 4, 0); }) ==
        "SequencePlacement: a sequence of 3 rows cannot be spread over 4 ranks: each must have one row at least");
  CHECK(support::thrown_by<std::invalid_argument>([] { SequencePlacement(3, 2, 2); }) ==
        "SequencePlacement: rank must be from 0 to 1, got 2");
}
