// Operands in pairs of bfloat16: every layout of what is packed, every odd depth, and the product that the tile makes.

#include "diffattn/product/packed_pairs.hpp"

#include <limits>

#include "product/plain.hpp"
#include "support/catch.hpp"

namespace {

using diffattn::detail::LeftOperand;
using diffattn::detail::round_up;
using diffattn::detail::Tile;
using diffattn::simd::Pair;
using support::Index;
using support::Laid;
using support::Layout;

constexpr Index kPairRows = Tile<float>::kRows, kPairCols = Tile<float>::kCols;

Pair pairs_of_nan() {
  return {std::numeric_limits<Eigen::bfloat16>::quiet_NaN(), std::numeric_limits<Eigen::bfloat16>::quiet_NaN()};
}

/// Memory for pairs, aligned to a packet and full of NaN.
struct PairMemory {
  explicit PairMemory(Index size) : frame(workspace), data(workspace.take<Pair>(size)) {
    std::fill_n(data, size, pairs_of_nan());
  }
  diffattn::Workspace workspace;
  diffattn::Workspace::Frame frame;
  Pair* data;
};

/// How many elements of a · b come out wrong, a being packed in groups or copied row by row, b by columns or transposed.
template <typename T>
Index pairs_wrong_products(const support::Matrix<T>& a, const support::Matrix<T>& b, Layout layout) {
  const Index m = a.rows(), n = b.cols(), pairs = diffattn::detail::steps_of<Pair>(a.cols());
  const support::Matrix<T> transposed = b.transpose();
  const Laid<T> a_laid(a, layout), b_laid(b, layout), transposed_laid(transposed, layout);
  const PairMemory groups(round_up(m, kPairRows) * pairs + kPairCols), rows((m + kPairRows) * pairs),
      columns(round_up(n, kPairCols) * pairs), keys(round_up(n, kPairCols) * pairs);
  diffattn::detail::pack_rows(groups.data, a_laid.read());
  diffattn::detail::copy_rows(rows.data, a_laid.read());
  CHECK(diffattn::detail::pack_columns(columns.data, pairs, b_laid.read()));
  diffattn::detail::pack_transposed(keys.data, transposed_laid.read(), 0, n);

  const support::Matrix<float> product =
      support::plain_product<float, float>(a.template cast<float>(), b.template cast<float>());
  Index wrong = 0;
  for (Index i = 0; i < m; i += kPairRows) {
    for (Index j = 0; j < n; j += kPairCols) {
      for (const LeftOperand<Pair>& left : {LeftOperand<Pair>{groups.data + i * pairs, 1, kPairRows},
                                            LeftOperand<Pair>{rows.data + i * pairs, pairs, 1}}) {
        for (const Pair* const strip : {columns.data + j * pairs, keys.data + j * pairs}) {
          const support::Aligned<float> tile(kPairRows * kPairCols, 0);
          diffattn::detail::add_product(tile.data(), kPairCols, false, left, strip, pairs, std::min(kPairRows, m - i),
                                        std::min(kPairCols, n - j));
          for (Index r = i; r < std::min(i + kPairRows, m); ++r) {
            for (Index c = j; c < std::min(j + kPairCols, n); ++c) {
              wrong += tile[(r - i) * kPairCols + c - j] != product(r, c);
            }
          }
        }
      }
    }
  }
  return wrong;
}

}  // namespace

TEMPLATE_TEST_CASE("Operands packed in pairs multiply to the product, whatever their layout and depth", "[product]",
                   float, Eigen::bfloat16) {
  support::Rng rng = support::make_rng();
  for (const Layout layout : support::kLayouts) {
    for (const Index depth : {1, 2, 7, 8, 31, 32, 33, 64, 65, 129, 200}) {
      for (const Index rows : {1, 5, 13}) {
        const Index cols = 3 * rows + 1;
        INFO(support::describe(layout) << ", depth " << depth << ", " << rows << " x " << cols);
        const auto a = support::whole_numbers<TestType>(rows, depth, rng);
        const auto b = support::whole_numbers<TestType>(depth, cols, rng);
        CHECK(pairs_wrong_products(a, b, layout) == 0);
      }
    }
  }
}

TEST_CASE("Columns packed in pairs say whether all of them are finite", "[product]") {
  for (const Index rows : {1, 2, 5, 17}) {
    for (const Index cols : {1, 7, 16, 40}) {
      const PairMemory strips(round_up(cols, kPairCols) * rows);
      for (Index bad = 0; bad < rows * cols; bad += 3) {
        support::Matrix<Eigen::bfloat16> b(rows, cols);
        b.setConstant(Eigen::bfloat16(2));
        CHECK(diffattn::detail::pack_columns(strips.data, (rows + 1) / 2, diffattn::detail::view_of(std::as_const(b))));
        b.data()[bad] = static_cast<Eigen::bfloat16>(bad % 2 == 0 ? std::numeric_limits<float>::infinity()
                                                                  : std::numeric_limits<float>::quiet_NaN());
        CHECK_FALSE(
            diffattn::detail::pack_columns(strips.data, (rows + 1) / 2, diffattn::detail::view_of(std::as_const(b))));
      }
    }
  }
}
