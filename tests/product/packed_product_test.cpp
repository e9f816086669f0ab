// Products with both sides packed, alone and several at once: sizes around a tile, a strip, a block of depth, of rows and
// of columns, every layout, what is stored narrower, bias and sum, threads, and what is not finite.

#include "diffattn/product/packed_product.hpp"

#include <cmath>
#include <cstring>
#include <span>

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/product/product_tasks.hpp"
#include "product/plain.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/scalars.hpp"

namespace {

namespace detail = diffattn::detail;
using diffattn::Serial;
using diffattn::Store;
using diffattn::Workspace;
using support::AnyExecutor;
using support::Index;
using support::Laid;
using support::Layout;
using support::Matrix;

/// y = a b (+ bias) or y += a b of whole numbers, for one size: right to the last bit and nowhere else. `draw` picks
/// layouts, bias and store.
template <typename Scalar, typename Stored>
void check_packed_product(Index rows, Index depth, Index cols, Index draw, support::Rng& rng) {
  INFO(rows << " x " << depth << " x " << cols << ", draw " << draw << ", bytes " << sizeof(Stored));
  const auto a = support::whole_numbers<Scalar>(rows, depth, rng),
             start = support::whole_numbers<Scalar>(rows, cols, rng);
  const auto b = support::whole_numbers<Stored>(depth, cols, rng);
  const Matrix<Scalar> bias_row = support::whole_numbers<Scalar>(1, cols, rng);
  const bool has_bias = draw % 2 == 0, adds = draw % 3 == 0;
  const std::vector<Scalar> bias(bias_row.data(), bias_row.data() + (has_bias ? cols : 0));

  const auto layout = [&](Index divisor) { return support::kLayouts[static_cast<std::size_t>(draw / divisor) % 5]; };
  const Laid<Scalar> y(start, layout(1)), a_laid(a, layout(5));
  const Laid<Stored> b_laid(b, layout(25));
  const detail::Product<Scalar, Stored> product{y.view(), a_laid.read(), b_laid.read(),
                                                has_bias && cols != 0 ? bias.data() : nullptr,
                                                adds ? Store::add : Store::overwrite};
  Workspace workspace;
  Serial serial;
  detail::multiply(product, workspace, serial);
  CHECK(y.matrix() == support::plain_product(a, b, bias, adds ? start : Matrix<Scalar>()));
  CHECK(y.surroundings_untouched());
}

/// Values with all their bits in use, so that another order of additions shows.
template <typename Scalar>
Matrix<Scalar> packed_fractions(Index rows, Index cols, support::Rng& rng) {
  std::uniform_real_distribution<Scalar> numbers(-1, 1);
  Matrix<Scalar> matrix(rows, cols);
  for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = numbers(rng);
  return matrix;
}

template <typename Scalar>
Matrix<Scalar> packed_product_of(const Matrix<Scalar>& a, const Matrix<Scalar>& b, AnyExecutor executor) {
  Matrix<Scalar> y = Matrix<Scalar>::Constant(a.rows(), b.cols(), 7);
  Workspace workspace;
  const detail::Product<Scalar> product{detail::writable_view_of(y), detail::view_of(a), detail::view_of(b)};
  detail::multiply(product, workspace, executor);
  return y;
}

template <typename Scalar>
bool packed_same_bits(const Matrix<Scalar>& a, const Matrix<Scalar>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(Scalar)) == 0;
}

}  // namespace

TEMPLATE_TEST_CASE("A packed product is a b, a b + bias or y + a b around every edge of the tile", "[product]",
                   DIFFATTN_TEST_SCALARS) {
  using Tile = detail::Tile<TestType>;
  support::Rng rng = support::make_rng();
  Index draw = 0;
  for (const Index rows : {Index{0}, Index{1}, Tile::kRows - 1, Tile::kRows, Tile::kRows + 1, 4 * Tile::kRows + 1}) {
    for (const Index cols : {Index{0}, Index{1}, Tile::kCols - 1, Tile::kCols, Tile::kCols + 1, 2 * Tile::kCols + 3}) {
      for (const Index depth : {0, 1, 63, 64, 65, 193}) {
        check_packed_product<TestType, TestType>(rows, depth, cols, draw, rng);
        check_packed_product<TestType, Eigen::bfloat16>(rows, depth, cols, draw, rng);
        draw += 7;  // no divisor of the numbers of layouts and stores: all meet
      }
    }
  }
}

TEMPLATE_TEST_CASE("A packed product goes on from block to block of depth, rows and columns", "[product]",
                   DIFFATTN_TEST_SCALARS) {
  using Block = detail::ProductBlock<TestType>;
  support::Rng rng = support::make_rng();
  Index draw = 0;
  for (const auto& [rows, depth, cols] : {std::tuple{Index{70}, 2 * Block::kDepth + 1, Index{67}},
                                          {70, Block::kDepth, 5},
                                          {3, Block::kDepthOfFew + 1, 40},
                                          {Block::kMostRows + 1, 7, 5},
                                          {2 * Block::kMostRows, 3, 2},
                                          {30, 9, Block::kMostCols + 1}}) {
    for (int i = 0; i < 3; ++i, draw += 7) check_packed_product<TestType, TestType>(rows, depth, cols, draw, rng);
  }
}

TEMPLATE_TEST_CASE("A packed product has the same bits for any threads, and a row or a column of it by itself",
                   "[product]", DIFFATTN_TEST_SCALARS) {
  support::Rng rng = support::make_rng();
  Serial one;
  for (const Index rows : {2, 61, 150}) {
    const auto a = packed_fractions<TestType>(rows, 450, rng), b = packed_fractions<TestType>(450, 301, rng);
    const Matrix<TestType> whole = packed_product_of<TestType>(a, b, AnyExecutor(one));
    for (const Index threads : {2, 3}) {
      diffattn::ThreadPool pool(threads);
      CHECK(packed_same_bits<TestType>(packed_product_of<TestType>(a, b, AnyExecutor(pool)), whole));
    }
    support::Backwards backwards{7};
    CHECK(packed_same_bits<TestType>(packed_product_of<TestType>(a, b, AnyExecutor(backwards)), whole));
    CHECK(packed_same_bits<TestType>(packed_product_of<TestType>(a.row(rows - 1), b, AnyExecutor(one)),
                                     whole.row(rows - 1)));
    CHECK(packed_same_bits<TestType>(packed_product_of<TestType>(a, b.col(300), AnyExecutor(one)), whole.col(300)));
  }
}

TEST_CASE("Several products at once are each what it is alone, and those that add to one y follow in order",
          "[product]") {
  support::Rng rng = support::make_rng();
  struct Case {
    Matrix<float> y, a, b, expected;
  };
  // Small ones share a run of several threads, large ones do not; empty ones are skipped.
  for (const Index rows : {0, 1, 80, 300}) {
    std::vector<Case> cases;
    for (const Index cols : {40, 0, 33, 1}) {
      for (const Index depth : {64, 0, 5}) {
        Case one{support::whole_numbers<float>(rows, cols, rng),
                 support::whole_numbers<float>(rows, depth, rng),
                 support::whole_numbers<float>(depth, cols, rng),
                 {}};
        one.expected = support::plain_product(one.a, one.b);
        cases.push_back(one);
      }
    }
    for (const Index threads : {1, 2, 3, 4}) {
      INFO(rows << " rows, " << threads << " threads");
      std::vector<Case> run = cases;
      std::vector<detail::Product<float>> products;
      std::vector<Matrix<float>> expected;
      for (Case& one : run) {
        const auto y = detail::writable_view_of(one.y);
        products.push_back({y, detail::view_of(one.a), detail::view_of(one.b)});
        expected.push_back(one.expected);
        if (one.a.cols() != 5) continue;
        for (int again = 0; again < 2; ++again) {  // y = a b + a b + a b
          products.push_back({y, detail::view_of(one.a), detail::view_of(one.b), nullptr, Store::add});
          expected.back() += one.expected;
        }
      }
      diffattn::ThreadPool pool(threads);
      AnyExecutor executor(pool);
      Workspace workspace;
      detail::multiply_all(std::span<const detail::Product<float>>(products), workspace, executor);
      for (std::size_t i = 0; i < run.size(); ++i) CHECK(run[i].y == expected[i]);
    }
  }
}

TEST_CASE("What is not finite stays in its row of a or its column of b in a packed product", "[product]") {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();
  support::Rng rng = support::make_rng();
  Serial one;
  for (const Index rows : {1, 7, 40}) {
    Matrix<float> a = support::whole_numbers<float>(rows, 70, rng), b = support::whole_numbers<float>(70, 35, rng);
    a.col(3).setConstant(2);
    const Matrix<float> clean = packed_product_of<float>(a, b, AnyExecutor(one));
    b(3, 34) = -kInf;
    if (rows > 1) a(rows - 1, 69) = kNaN;
    const Matrix<float> y = packed_product_of<float>(a, b, AnyExecutor(one));
    const Index finite_rows = rows > 1 ? rows - 1 : rows;
    CHECK((rows == 1 || y.row(rows - 1).array().isNaN().all()));
    CHECK((y.col(34).head(finite_rows).array() == -kInf).all());
    CHECK(y.topLeftCorner(finite_rows, 34) == clean.topLeftCorner(finite_rows, 34));
  }
}
