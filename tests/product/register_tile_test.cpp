// The register tile: every size that it is made for, chains that make no difference, and rows that it leaves alone.

#include "diffattn/product/register_tile.hpp"

#include "product/plain.hpp"
#include "support/catch.hpp"
#include "support/scalars.hpp"
#include "support/tolerances.hpp"

namespace {

using diffattn::detail::Ahead;
using diffattn::detail::LeftOperand;
using diffattn::detail::Tile;
using support::Index;

/// b (depth x n) as strips of kCols columns, one every kCols * depth values. Past the last column there is NaN, which
/// may get into columns that nobody asked for and no others.
template <typename Scalar>
void put_strips(Scalar* to, const support::Matrix<Scalar>& b) {
  constexpr Index kCols = Tile<Scalar>::kCols;
  for (Index k = 0; k < b.rows(); ++k) {
    for (Index j = 0; j < b.cols(); ++j) to[j / kCols * kCols * b.rows() + k * kCols + j % kCols] = b(k, j);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("A tile of any size is the product, or adds it", "[product]", DIFFATTN_TEST_SCALARS) {
  constexpr Index kRows = Tile<TestType>::kRows, kCols = Tile<TestType>::kCols, kStride = 2 * kCols;
  constexpr TestType kNaN = std::numeric_limits<TestType>::quiet_NaN();
  support::Rng rng = support::make_rng();
  for (const Index depth : {0, 1, 2, 63, 64, 65, 130}) {
    const auto a = support::whole_numbers<TestType>(kRows, depth, rng);
    const support::Matrix<TestType> columns = a.transpose();
    const auto b = support::whole_numbers<TestType>(depth, kCols, rng);
    const auto product = support::plain_product(a, b);
    for (Index rows = 1; rows <= kRows; ++rows) {
      for (Index cols = 1; cols <= kCols; ++cols) {
        support::Aligned<TestType> strip(kCols * depth, kNaN);
        put_strips<TestType>(strip.data(), b.leftCols(cols));
        for (const bool add : {false, true}) {
          for (const LeftOperand<TestType>& left :
               {LeftOperand<TestType>{a.data(), depth, 1}, LeftOperand<TestType>{columns.data(), 1, kRows}}) {
            support::Aligned<TestType> to(kRows * kStride, TestType(7));
            diffattn::detail::add_product(to.data(), kStride, add, left, strip.data(), depth, rows, cols);
            Index wrong = 0;
            for (Index r = 0; r < kRows; ++r) {
              for (Index c = 0; c < kStride; ++c) {
                const TestType got = to[r * kStride + c];
                if (r < rows && c < cols) {
                  wrong += got != product(r, c) + TestType(add ? 7 : 0);
                } else if (r >= diffattn::detail::round_up(rows, kRows / 3) || c >= kCols) {
                  wrong += got != 7;  // outside the tile
                }
              }
            }
            INFO("depth " << depth << ", " << rows << " x " << cols << ", add " << add);
            CHECK(wrong == 0);
          }
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("A product in pieces of whole chains has the same bits", "[product]", DIFFATTN_TEST_SCALARS) {
  constexpr Index kRows = Tile<TestType>::kRows, kCols = Tile<TestType>::kCols, kDepth = 200;
  support::Rng rng = support::make_rng();
  const auto a = support::random_matrix<TestType>(kRows, kDepth, rng);
  const auto b = support::random_matrix<TestType>(kDepth, kCols, rng);
  support::Aligned<TestType> strip(kCols * kDepth, TestType(0));
  put_strips<TestType>(strip.data(), b);
  for (const Index chain : {Index{32}, diffattn::detail::kChain}) {
    support::Aligned<TestType> whole(kRows * kCols, TestType(0)), pieces(kRows * kCols, TestType(0)),
        ahead(kRows * kCols, TestType(0));
    diffattn::detail::add_product(whole.data(), kCols, false, {a.data(), kDepth, 1}, strip.data(), kDepth, kRows, kCols,
                                  {}, {}, chain);
    for (Index k = 0; k < kDepth; k += chain) {
      diffattn::detail::add_product(pieces.data(), kCols, k != 0, {a.data() + k, kDepth, 1}, strip.data() + k * kCols,
                                    std::min(chain, kDepth - k), kRows, kCols);
    }
    diffattn::detail::add_product(ahead.data(), kCols, false, {a.data(), kDepth, 1}, strip.data(), kDepth, kRows, kCols,
                                  Ahead<TestType>{a.data(), a.size()}, Ahead<TestType>{b.data(), b.size()}, chain);
    CHECK(std::equal(whole.data(), whole.data() + kRows * kCols, pieces.data()));
    CHECK(std::equal(whole.data(), whole.data() + kRows * kCols, ahead.data()));
  }
}

TEMPLATE_TEST_CASE("A row of tiles adds to strips, of any number of columns", "[product]", DIFFATTN_TEST_SCALARS) {
  constexpr Index kRows = Tile<TestType>::kRows, kCols = Tile<TestType>::kCols;
  support::Rng rng = support::make_rng();
  for (const Index depth : {0, 1, 70}) {
    for (const Index cols : {Index{1}, kCols - 1, kCols, kCols + 1, 3 * kCols - 2}) {
      const Index strips = diffattn::detail::divide_up(cols, kCols), out_strip = (kRows + 2) * kCols;
      const auto a = support::whole_numbers<TestType>(kRows, depth, rng);
      const auto b = support::whole_numbers<TestType>(depth, cols, rng);
      const auto product = support::plain_product(a, b);
      support::Aligned<TestType> right(strips * kCols * depth, TestType(0)), out(strips * out_strip, TestType(7));
      put_strips<TestType>(right.data(), b);
      diffattn::detail::add_products<TestType>(out.data(), out_strip, {a.data(), depth, 1}, right.data(), kCols * depth,
                                               kRows - 1, cols, depth, {a.data(), a.size()}, 1, {b.data(), 8});
      Index wrong = 0;
      for (Index r = 0; r < kRows - 1; ++r) {
        for (Index c = 0; c < cols; ++c) {
          wrong += out[c / kCols * out_strip + r * kCols + c % kCols] != product(r, c) + 7;
        }
      }
      INFO("depth " << depth << ", cols " << cols);
      CHECK(wrong == 0);
      CHECK(out.end_untouched());
    }
  }
}
